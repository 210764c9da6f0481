"""Products with parameter components, one matrix at a time.

x is `batch *pos d_in`, or integers `batch *pos` that pick rows (a one-hot x, never built).
"""

import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apd_lens._errors import ShapeMismatch

Inputs = Float[Tensor, "batch *pos d_in"] | Int[Tensor, "batch *pos"]
Mask = Float[Tensor, "examples *mask_pos C"] | Bool[Tensor, "examples *mask_pos C"]


def inner_activations(x: Inputs, A: Float[Tensor, "C d_in m"]) -> Float[Tensor, "batch *pos C m"]:
    """x A_c for every component."""
    side = rearrange(A, "C d_in m -> d_in (C m)")
    flat = x.to(A.dtype) @ side if x.is_floating_point() else F.embedding(x, side)
    return flat.unflatten(-1, (A.shape[0], A.shape[2]))


def masked_product(
    x: Inputs, A: Float[Tensor, "C d_in m"], B: Float[Tensor, "C m d_out"], mask: Mask | None = None
) -> Float[Tensor, "examples *pos d_out"]:
    """Σ_c s_c x A_c B_c, each data point with its own mask.

    A mask `batch C` holds for all positions of an example, `batch pos C` for each position on its own; values between
    0 and 1 scale a component. The batch axis of x is that of the mask, or 1 where all examples share x.
    """
    inner = inner_activations(x, A)
    if mask is not None:
        inner = inner * _spread(mask, inner)[..., None]
    return einsum(inner, B, "... C m, C m d_out -> ... d_out")


def component_outputs(
    x: Inputs, A: Float[Tensor, "C d_in m"], B: Float[Tensor, "C m d_out"]
) -> Float[Tensor, "batch *pos C d_out"]:
    """x A_c B_c for every component on its own."""
    return einsum(inner_activations(x, A), B, "... C m, C m d_out -> ... C d_out")


def _spread(mask: Tensor, inner: Tensor) -> Tensor:
    """The mask with an axis of length 1 for every position axis that it lacks, in the dtype of `inner`."""
    *data_points, n_components = mask.shape
    *places, _, _ = inner.shape
    fits = len(data_points) <= len(places) and all(
        have == need or need == 1 for have, need in zip(data_points, places, strict=False)
    )
    if not fits:
        raise ShapeMismatch(
            f"The mask is {_shape(data_points, n_components)}, but a decomposed matrix was used on "
            f"{_shape(places, inner.shape[-2])} (batch *pos C). Give the mask of the batch that the model is called "
            "with: `batch C` for whole examples, `batch pos C` for each position."
        )
    return mask.to(inner.dtype).reshape(*data_points, *[1] * (len(places) - len(data_points)), n_components)


def _shape(leading: list[int], n_components: int) -> str:
    return "(" + ", ".join(map(str, [*leading, n_components])) + ")"
