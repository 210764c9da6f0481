"""Attributions: how much each component is estimated to matter for the output on each data point.

Gradient attributions in four steps: run the target once and keep x and y of every use; pull one-hot vectors back
through it, many at once, to get ∂f_o/∂y; multiply with what each component writes, x P_c; take the root mean square
over the outputs o.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from apd_lens._components import ParameterComponents
from apd_lens._errors import ShapeMismatch
from apd_lens._padding import zero_at_padding
from apd_lens._passes import Call, WatchedPass
from apd_lens._product import Inputs, component_outputs, inner_activations

# What a data point is: an example, or each position of an example.
Granularity = Literal["example", "position"]

# Bytes that the temporaries of one backward pass over several outputs may take.
_CHUNK_BYTES = 2**28


@dataclass(frozen=True)
class GradientAttribution:
    """A_c(x) = sqrt( mean_o ( Σ_l Σ_uses <∂f_o/∂y_l , x_l P_c,l> )² ), exact, one vector-Jacobian product an output.

    Gradients and x are those of the target model. For positions as data points the sum over positions is left out.
    The examples of a batch must not influence each other in the model. Outputs at padding (where the batch's
    `attention_mask` is 0) do not count, and padding itself has attribution 0. Source: Braun et al. 2025, arXiv
    2501.14926.
    """

    def __call__(
        self, watched: WatchedPass, components: ParameterComponents, granularity: Granularity
    ) -> Float[Tensor, "batch *pos C"]:
        total = None
        for effects in output_effects(watched, components, granularity):
            squares = effects.square().sum(0)
            total = squares if total is None else total + squares
        assert total is not None
        n_outputs = watched.n_outputs().to(total.dtype).reshape(-1, *[1] * (total.ndim - 1))
        return zero_at_padding((total / n_outputs).sqrt(), watched.real)


@dataclass(frozen=True)
class ActivationAttribution:
    """Σ_l Σ_uses ‖x_l P_c,l‖², with x from the forward pass of the summed components. Needs no gradients.

    Squared units of the activations. It says how much a component writes, not whether anything reads it.
    """

    def __call__(
        self, watched: WatchedPass, components: ParameterComponents, granularity: Granularity
    ) -> Float[Tensor, "batch *pos C"]:
        total = None
        with torch.no_grad():
            for call in watched.again(components).calls:
                norms = component_outputs(call.x, *components.factors(call.use)).square().sum(-1)
                norms = zero_at_padding(norms, watched.real)
                norms = _over_data_points(norms, granularity)
                total = norms if total is None else total + norms
        assert total is not None
        return total


Attribution = GradientAttribution | ActivationAttribution


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
    with torch.enable_grad():
        scalars = metric(watched.output)
    if scalars.shape != watched.output.shape[:1]:
        raise ShapeMismatch(
            f"Expected the metric to give one scalar an example, shape ({len(watched.output)},), got "
            f"{tuple(scalars.shape)} from an output of shape {tuple(watched.output.shape)}."
        )
    with torch.no_grad():
        jacobians = _vector_jacobian_products(scalars, torch.ones_like(scalars)[None], watched.calls, keep=False)
        return _effects(jacobians, watched.calls, components, granularity)[0]


def output_effects(
    watched: WatchedPass, components: ParameterComponents, granularity: Granularity
) -> Iterator[Float[Tensor, "out batch *pos C"]]:
    """Σ_l Σ_uses <∂f_o/∂y_l , x_l P_c,l> for every output o, in chunks of outputs. Uses up the pass's graph."""
    with torch.no_grad():
        for jacobians in _jacobian_chunks(watched):
            yield _effects(jacobians, watched.calls, components, granularity)


def _jacobian_chunks(watched: WatchedPass) -> Iterator[list[Float[Tensor, "out batch *pos d_out"] | None]]:
    """∂f_o/∂y of every call, in chunks of outputs; kept on the pass if one chunk holds them all."""
    if watched.jacobians:
        yield watched.jacobians
        return
    output = watched.output
    n_outputs = output[0].numel()
    bytes_per_output = sum(call.y.numel() for call in watched.calls) * output.element_size() * 4
    chunk = max(1, min(n_outputs, _CHUNK_BYTES // bytes_per_output))
    for first in range(0, n_outputs, chunk):
        chosen = torch.arange(first, min(first + chunk, n_outputs), device=output.device)
        one_hot = torch.zeros(len(chosen), n_outputs, device=output.device, dtype=output.dtype)
        one_hot[torch.arange(len(chosen)), chosen] = 1
        # One cotangent serves all examples at once, since they do not influence each other.
        cotangents = one_hot.reshape(-1, 1, *output.shape[1:]).expand(-1, len(output), *output.shape[1:])
        last = first + chunk >= n_outputs
        jacobians = _vector_jacobian_products(output, cotangents, watched.calls, keep=not last)
        if chunk == n_outputs:
            watched.jacobians.extend(jacobians)
        yield jacobians


def _vector_jacobian_products(
    output: Tensor, cotangents: Tensor, calls: list[Call], keep: bool
) -> list[Float[Tensor, "out batch *pos d_out"] | None]:
    """For every call, ∂(cotangent · output)/∂y for each cotangent; None where the output does not depend on y."""
    return list(
        torch.autograd.grad(
            output,
            [call.y for call in calls],
            cotangents,
            is_grads_batched=True,
            retain_graph=keep,
            allow_unused=True,
        )
    )


def _effects(
    jacobians: list[Tensor | None], calls: list[Call], components: ParameterComponents, granularity: Granularity
) -> Float[Tensor, "out batch *pos C"]:
    total = None
    for jacobian, call in zip(jacobians, calls, strict=True):
        if jacobian is not None:
            effect = component_effects(jacobian, call.x, *components.factors(call.use), granularity)
            if total is not None and total.shape != effect.shape:
                raise ShapeMismatch(
                    f"With positions as data points every decomposed matrix must be used on the same positions, but "
                    f"{call.use.matrix} was used on {tuple(effect.shape[1:-1])} (batch *pos) and the ones before it on "
                    f"{tuple(total.shape[1:-1])}. Decompose them separately, or use granularity='example'."
                )
            total = effect if total is None else total + effect
    if total is None:
        raise ShapeMismatch(
            "The output does not depend on any of the decomposed matrices, so there is nothing to attribute. Check "
            "output= and weights=."
        )
    return total


def component_effects(
    jacobian: Float[Tensor, "out batch *pos d_out"],
    x: Inputs,
    A: Float[Tensor, "C d_in m"],
    B: Float[Tensor, "C m d_out"],
    granularity: Granularity,
) -> Float[Tensor, "out batch *data_pos C"]:
    """<∂f_o/∂y , x P_c> of one use, for every output and component; summed over positions for whole examples."""
    jacobian = jacobian.to(A.dtype)
    if len(jacobian) == 1 or A.shape[-1] == 1:
        # (J Bᵀ) · (x A): no tensor of size batch × C × d_out.
        pulled = einsum(jacobian, B, "out ... d_out, C m d_out -> out ... C m")
        return _over_data_points((pulled * inner_activations(x, A)).sum(-1), granularity, first=2)
    # With several outputs and rank > 1 it pays to build x P_c once: m + out instead of m · out multiplications.
    written = component_outputs(x, A, B)
    if granularity == "example":
        return einsum(
            rearrange(jacobian, "out batch ... d_out -> batch out (... d_out)"),
            rearrange(written, "batch ... C d_out -> batch C (... d_out)"),
            "batch out p, batch C p -> out batch C",
        )
    return einsum(jacobian, written, "out ... d_out, ... C d_out -> out ... C")


def _over_data_points(effects: Tensor, granularity: Granularity, first: int = 1) -> Tensor:
    """Sums the position axes, those between the `first` axes and the last, away for whole examples."""
    positions = tuple(range(first, effects.ndim - 1))
    return effects.sum(positions) if granularity == "example" and positions else effects
