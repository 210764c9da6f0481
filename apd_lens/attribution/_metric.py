"""Signed attributions to a scalar of the output that the user chooses."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from apd_lens._errors import ShapeMismatch
from apd_lens._memory import BUDGET
from apd_lens.attribution._effects import effects_of_calls
from apd_lens.attribution._pullback import Jacobians
from apd_lens.components._components import ParameterComponents
from apd_lens.data._batch import Batch
from apd_lens.data._points import Granularity
from apd_lens.passes._watch import WatchedPass

# The explained output -> one scalar an example, `batch`; or (output, batch) -> that, where the scalar depends on the
# batch too, such as the logit of the right token. The batch is what the model is called with, on its device.
Metric = Callable[[Tensor], Tensor] | Callable[[Tensor, Any], Tensor]


def metric_effects(
    watched: WatchedPass,
    components: ParameterComponents,
    granularity: Granularity,
    metric: Callable[[Tensor], Tensor],
) -> Float[Tensor, "batch *pos C"]:
    """Σ_l Σ_uses <∂metric/∂y_l , x_l P_c,l>: signed, positive where a component raises the metric.

    Args:
        metric: the explained output -> one scalar an example, `batch`.

    Raises:
        ShapeMismatch: the metric does not return one scalar an example.
    """
    jacobians = metric_gradients(watched, metric)
    with torch.no_grad():
        return torch.cat(list(effects_of_calls(jacobians, watched.calls, components, granularity, BUDGET)), 1)[0]


def metric_gradients(watched: WatchedPass, metric: Callable[[Tensor], Tensor]) -> Jacobians:
    """∂metric/∂y of every call, `1 batch *pos d_out`. Uses up the pass's graph. Raises as `metric_effects` does."""
    with torch.enable_grad():
        scalars = metric_scalars(metric, watched.output)
    ys = [call.y for call in watched.calls]
    gradients = torch.autograd.grad(scalars, ys, torch.ones_like(scalars), allow_unused=True)
    return Jacobians.whole([None if gradient is None else gradient[None] for gradient in gradients])


def metric_scalars(
    metric: Callable[[Tensor], Tensor], output: Float[Tensor, "batch *pos n_outputs"]
) -> Float[Tensor, " batch"]:
    """The metric of each example, checked. Raises as `metric_effects` does."""
    scalars = metric(output)
    if not isinstance(scalars, Tensor) or scalars.shape != output.shape[:1]:
        came = tuple(scalars.shape) if isinstance(scalars, Tensor) else type(scalars).__name__
        raise ShapeMismatch(
            f"Expected the metric to give one scalar an example, shape ({len(output)},), got {came} from an output of "
            f"shape {tuple(output.shape)}."
        )
    return scalars


def metric_on(metric: Metric, batch: Batch) -> Callable[[Tensor], Tensor]:
    """The metric as a function of the output alone; one that takes two arguments is given the batch too."""
    parameters = inspect.signature(metric).parameters.values()
    needed = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty]
    return (lambda output: metric(output, batch)) if len(needed) > 1 else metric  # pyright: ignore[reportReturnType, reportCallIssue]
