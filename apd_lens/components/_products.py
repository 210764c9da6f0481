"""Products with parameter components, one matrix at a time.

x is `batch *pos d_in`, or integers `batch *pos` that pick rows (a one-hot x, never built).
"""

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from apd_lens._errors import ShapeMismatch
from apd_lens.components._factors import Mask, MatrixInput
from apd_lens.components._pairs import ActivePairs, cheapest_way, pairwise_product


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
    inner = inner_activations(x, A)
    if mask is not None:
        inner = inner * _spread(mask, inner)[..., None]
    return einsum(inner, B, "... C m, C m d_out -> ... d_out")


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
