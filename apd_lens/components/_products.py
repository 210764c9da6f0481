"""Products with parameter components, one matrix at a time.

x is `batch *pos d_in`, or integers `batch *pos` that pick rows (a one-hot x, never built).
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from apd_lens._errors import ShapeMismatch
from apd_lens._memory import BUDGET, fitting, slices
from apd_lens.components._factors import Mask, MatrixInput
from apd_lens.components._pairs import ActivePairs, cheapest_way, pairwise_product

# x A of so many numbers is not kept for the backward pass, but computed again.
_KEPT = 2**18


def inner_activations(x: MatrixInput, A: Float[Tensor, "C d_in m"]) -> Float[Tensor, "batch *pos C m"]:
    """x A_c for every component."""
    side = rearrange(A, "C d_in m -> d_in (C m)")
    flat = x.to(A.dtype) @ side if x.is_floating_point() else F.embedding(x, side)
    return flat.unflatten(-1, (A.shape[0], A.shape[2]))


def component_outputs(
    x: MatrixInput, A: Float[Tensor, "C d_in m"], B: Float[Tensor, "C m d_out"]
) -> Float[Tensor, "batch *pos C d_out"]:
    """x A_c B_c for every component on its own."""
    return einsum(inner_activations(x, A), B, "... C m, C m d_out -> ... C d_out")


def masked_product(
    x: MatrixInput,
    A: Float[Tensor, "C d_in m"],
    B: Float[Tensor, "C m d_out"],
    mask: Mask | None = None,
    active: ActivePairs | None = None,
) -> Float[Tensor, "examples *pos d_out"]:
    """Σ_c s_c x A_c B_c, each data point with its own mask.

    A mask `batch C` holds for all positions of an example, `batch pos C` for each position on its own; values between
    0 and 1 scale a component. The batch axis of x is that of the mask, or 1 where all examples share x.

    Args:
        active: `active_pairs(mask)`. Where few are active it is cheaper to multiply pair by pair; the result is the
            same, in another order of summation.
    """
    if mask is not None:
        _check_fits(mask, x.shape[:-1] if x.is_floating_point() else x.shape)
        if active is not None:
            way = cheapest_way(x[..., :1].numel() if x.is_floating_point() else x.numel(), A, B, mask, active)
            if way != "dense":
                return pairwise_product(x, A, B, mask, active, way)
        if x.is_floating_point() and x[..., 0].numel() * A.shape[0] * A.shape[2] > _KEPT:
            return _product_in_pieces(x, A, B, mask)
    inner = inner_activations(x, A)
    if mask is not None:
        inner = inner * _spread(mask, inner)[..., None]
    return einsum(inner, B, "... C m, C m d_out -> ... d_out")


def _product_in_pieces(
    x: Float[Tensor, "batch *pos d_in"], A: Float[Tensor, "C d_in m"], B: Float[Tensor, "C m d_out"], mask: Mask
) -> Float[Tensor, "examples *pos d_out"]:
    """The masked product of some data points and components at a time; no x A is kept."""
    device = A.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else A.dtype
    *data_points, n_components = mask.shape
    places = torch.Size(data_points) + x.shape[len(data_points) : -1]
    rows = x.expand(*places, x.shape[-1]).reshape(torch.Size(data_points).numel(), -1, x.shape[-1])
    with torch.autocast(device, enabled=False):
        y = _MaskedProduct.apply(rows.to(dtype), A.to(dtype), B.to(dtype), mask.to(dtype).reshape(-1, n_components))
    return y.view(*places, B.shape[-1])


class _MaskedProduct(torch.autograd.Function):
    """x `data rows d_in`, A, B, mask `data C` -> `data rows d_out`. What is as large as x A is made in pieces."""

    @staticmethod
    def forward(x: Tensor, A: Tensor, B: Tensor, mask: Tensor) -> Tensor:
        y = x.new_zeros(*x.shape[:2], B.shape[-1])
        for data, chosen in _pieces(x, A):
            inner = _flat_inner(x[data], A[chosen]) * _of_each_part(mask[data, chosen], A.shape[2])
            y[data] += inner @ B[chosen].flatten(0, 1)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, A, B, mask = ctx.saved_tensors
        needs_x, needs_A, needs_B, needs_mask = ctx.needs_input_grad
        for_x = torch.zeros_like(x) if needs_x else None
        for_A = torch.zeros_like(A.mT, memory_format=torch.contiguous_format) if needs_A else None
        for_B = torch.zeros_like(B, memory_format=torch.contiguous_format) if needs_B else None
        for_mask = torch.zeros_like(mask) if needs_mask else None
        for data, chosen in _pieces(x, A):
            some, share = x[data], _of_each_part(mask[data, chosen], A.shape[2])
            pulled = gradient[data] @ B[chosen].flatten(0, 1).mT
            inner = _flat_inner(some, A[chosen]) if needs_B or needs_mask else pulled
            if for_mask is not None:
                for_mask[data, chosen] = (pulled * inner).unflatten(-1, (-1, A.shape[2])).sum((1, 3))
            pulled, inner = pulled * share, inner * share
            if for_x is not None:
                for_x[data] += pulled @ A[chosen].mT.flatten(0, 1)
            if for_A is not None:
                for_A[chosen] += (pulled.flatten(0, 1).mT @ some.flatten(0, 1)).view_as(for_A[chosen])
            if for_B is not None:
                for_B[chosen] += (inner.flatten(0, 1).mT @ gradient[data].flatten(0, 1)).view_as(for_B[chosen])
        return for_x, None if for_A is None else for_A.mT.detach(), for_B, for_mask


def _pieces(x: Float[Tensor, "data rows d_in"], A: Float[Tensor, "C d_in m"]) -> Iterator[tuple[slice, slice]]:
    """Data points and components whose x A, and twice as much, fit into a part of the budget."""
    (n_data, n_rows, _), (n_components, _, m) = x.shape, A.shape
    at_once = fitting(3 * n_rows * m * x.element_size(), BUDGET // 8)
    components_at_once = min(n_components, at_once)
    for data in slices(n_data, at_once // components_at_once):
        for chosen in slices(n_components, components_at_once):
            yield data, chosen


def _flat_inner(x: Float[Tensor, "data rows d_in"], A: Float[Tensor, "C d_in m"]) -> Float[Tensor, "data rows C_m"]:
    return x @ rearrange(A, "C d_in m -> d_in (C m)")


def _of_each_part(mask: Float[Tensor, "data C"], m: int) -> Float[Tensor, "data 1 C_m"]:
    """The mask for each of the m parts of a component."""
    return mask[:, None, :, None].expand(-1, -1, -1, m).flatten(2)


def _spread(mask: Tensor, inner: Tensor) -> Tensor:
    """The mask with an axis of length 1 for every position axis that it lacks, in the dtype of `inner`."""
    *data_points, n_components = mask.shape
    return mask.to(inner).reshape(*data_points, *[1] * (inner.ndim - 1 - mask.ndim), n_components)


def check_examples(mask: Mask, examples: int) -> None:
    """Raises ShapeMismatch for a mask of more or fewer examples than a forward has."""
    if len(mask) != examples:
        raise ShapeMismatch(
            f"The mask is {_shape(list(mask.shape[:-1]), mask.shape[-1])}, of {len(mask)} examples, but the model was "
            f"called with {examples}. Give the mask of the batch that the model is called with."
        )


def _check_fits(mask: Tensor, places: torch.Size) -> None:
    """Whoever calls the model checks the number of examples; x that all share has 1."""
    *data_points, n_components = mask.shape
    fits = (
        len(data_points) <= len(places)
        and places[0] in (data_points[0], 1)
        and tuple(data_points[1:]) == places[1 : len(data_points)]
    )
    if not fits:
        raise ShapeMismatch(
            f"The mask is {_shape(data_points, n_components)}, but a decomposed matrix was used on "
            f"{_shape(list(places), n_components)} (batch *pos C). Give the mask of the batch that the model is called "
            "with: `batch C` for whole examples, `batch pos C` for each position. To generate with a cache, whose "
            "forwards have the new tokens only, give `batch C`, such as mask.any(1)."
        )


def _shape(leading: list[int], n_components: int) -> str:
    return "(" + ", ".join(map(str, [*leading, n_components])) + ")"
