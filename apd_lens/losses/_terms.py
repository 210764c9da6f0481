"""The loss terms of a step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from apd_lens import _processes
from apd_lens._block import full_precision
from apd_lens._schedules import value_at
from apd_lens._shards import freed_after
from apd_lens.components._components import ParameterComponents
from apd_lens.components._factors import Mask
from apd_lens.data._points import without_padding
from apd_lens.losses._losses import Losses
from apd_lens.losses._outputs import hidden_activation_loss, mean_distance
from apd_lens.losses._weights import weight_losses
from apd_lens.passes._watch import WatchedPass

# In the order in which they are added up.
LOSS_TERMS = ("faithfulness", "minimality", "simplicity", "path", "completeness", "hidden", "attack", "sparsity")


@dataclass(frozen=True)
class Scales:
    """By the name of a matrix, what its part of faithfulness and of simplicity is divided by."""

    faithfulness: Mapping[str, float]
    simplicity: Mapping[str, float]


def weighted_sum(losses: Losses, terms: Mapping[str, Tensor], progress: float) -> Tensor:
    """Loss terms times their coefficients, when `progress`, a share of the steps, is done."""
    return torch.stack([value_at(getattr(losses, name), progress) * term for name, term in terms.items()]).sum(0)


def distance_scale(watched: WatchedPass, losses: Losses) -> Tensor | float:
    """What distances between outputs are divided by: the variance of the target's, where they are relative."""
    if not are_shares(losses):
        return 1.0
    variance = _processes.variance(without_padding(at_least_float32(watched.output.detach()), watched.valid))
    return torch.where(variance > 0, variance, 1.0)  # 1 where there is none


def output_distance(
    watched: WatchedPass,
    output: Tensor,
    losses: Losses,
    scale: Tensor | float,
    wanted: Tensor | None = None,
    examples: slice | None = None,
) -> Tensor:
    """The distance of an output from the target's, or from the one that is wanted.

    Args:
        examples: those that the output is of, one of several pieces; then it is what they add to the distance of all.
    """
    some = slice(None) if examples is None else examples
    target_output = at_least_float32((watched.output[some] if wanted is None else wanted).detach())
    valid = None if watched.valid is None else watched.valid[some]
    mean, count = mean_distance(target_output, at_least_float32(output), losses.distance, valid)
    if examples is None:
        return _processes.mean(mean, count) / scale
    n_points = without_padding(watched.output[..., :1], watched.valid).numel()
    n_here = without_padding(target_output[..., :1], valid).numel()
    return (mean if n_here else 0 * output.sum()) * (n_here / n_points) / scale  # of none the mean is NaN


def are_shares(losses: Losses) -> bool:
    """Whether distances are shares of the variance of the target's output."""
    return losses.normalization == "relative" and losses.distance == "mse"


def damped(distance: Tensor, total: Tensor, losses: Losses) -> Tensor:
    """A distance whose gradient is divided by the total where that is above 1: the gradient is that of 1 + ln total.

    A model of random parts can be wrong by many orders of magnitude. Then nothing but the distance would count, and
    Adam, which divides by the size of past gradients, would stand still for as long as it remembers them. Only where
    distances are shares of the variance, of which a constant output misses 1.

    Args:
        distance: the total, or a part of it.
    """
    if not are_shares(losses):
        return distance
    part = distance / total.detach().clamp_min(1.0)
    return part + (distance - part).detach()


def weight_terms(
    losses: Losses,
    scales: Scales,
    weights: Mapping[str, Tensor],
    components: ParameterComponents,
    importance: Mask,
    share: Tensor | float = 1.0,
) -> dict[str, Tensor]:
    """Faithfulness and simplicity.

    Args:
        importance: the mask, or what has its place in simplicity, without padding.
        share: what simplicity is divided by besides its scale.
    """

    def of_matrix(name: str) -> Tensor:
        A, B, p = components.A[name], components.B[name], losses.schatten_p
        on = importance.to(A.device)
        error, norms = weight_losses(weights[name], A, B, on, p, losses.simplicity_floor)
        return torch.stack([error / scales.faithfulness[name], norms / scales.simplicity[name]])

    with full_precision():  # sums of weights, not a pass of the model
        of_each = [freed_after(partial(of_matrix, name)).to(importance.device) for name in components.names]
        errors, norms = zip(*(pair.unbind() for pair in of_each), strict=True)
    return {
        "faithfulness": torch.stack(errors).sum(),
        "simplicity": torch.stack(norms).sum() / share,
    }


def hidden_terms(losses: Losses, watched: WatchedPass, hidden: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The distance of the activations of `losses.hidden_at` on the active components, if it counts."""
    if not losses.hidden:
        return {}
    kept, kept_sparse = (
        {
            name: without_padding(activation, watched.valid).to(watched.output.device)
            for name, activation in activations.items()
        }
        for activations in (watched.hidden, hidden)
    )
    return {"hidden": _hidden_term(kept, kept_sparse, losses.normalization == "relative")}


def at_least_float32(output: Tensor) -> Tensor:
    return output.to(torch.promote_types(output.dtype, torch.float32))


def _hidden_term(target: dict[str, Tensor], sparse: dict[str, Tensor], relative: bool) -> Tensor:
    """Σ_places mean over data points Σ_units squared error, over the number of units (times the target's variance)."""
    means = [
        _processes.mean(hidden_activation_loss(activation, sparse[name]), activation[..., 0].numel())
        for name, activation in target.items()
    ]
    errors = torch.stack(means).sum()
    units = sum(activation.shape[-1] for activation in target.values())
    if not relative:
        return errors / units
    variances = [_processes.variance(activation) * activation.shape[-1] for activation in target.values()]
    return errors / torch.stack(variances).sum()


def scales_of(losses: Losses, weights: Mapping[str, Tensor]) -> Scales:
    """Where losses are relative, what each whole matrix has, over the share of the parameters that are in it."""
    n_parameters = float(sum(weight.numel() for weight in weights.values()))
    if losses.normalization == "paper":
        return Scales(dict.fromkeys(weights, n_parameters), dict.fromkeys(weights, n_parameters))

    def relative(of_one: Callable[[Tensor], Tensor]) -> dict[str, float]:
        return {
            name: (of_one(weight).sum().item() or 1.0) * n_parameters / weight.numel()
            for name, weight in weights.items()
        }

    return Scales(
        faithfulness=relative(torch.square),
        simplicity=relative(lambda weight: torch.linalg.svdvals(weight).pow(losses.schatten_p)),
    )
