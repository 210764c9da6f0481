"""Algebra on the factors A, B of one matrix: sums of components, inner products, norms."""

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apd_lens._block import full_precision
from apd_lens._memory import fitting

MatrixInput = Float[Tensor, "batch *pos d_in"] | Int[Tensor, "batch *pos"]
Mask = Float[Tensor, "examples *mask_pos C"] | Bool[Tensor, "examples *mask_pos C"]


@full_precision()
def sum_of_components(A: Float[Tensor, "C d_in m"], B: Float[Tensor, "C m d_out"]) -> Float[Tensor, "d_in d_out"]:
    """Σ_c A_c B_c, without building the components one by one."""
    columns, rows = side_by_side(A, B)
    return columns @ rows


def side_by_side(
    A: Float[Tensor, "C d_in m"], B: Float[Tensor, "C m d_out"]
) -> tuple[Float[Tensor, "d_in C_m"], Float[Tensor, "C_m d_out"]]:
    """The columns of all A_c, and the rows of all B_c, each as one matrix."""
    return rearrange(A, "... C d_in m -> ... d_in (C m)"), rearrange(B, "... C m d_out -> ... (C m) d_out")


@full_precision()
def inner_products(
    A: Float[Tensor, "C d_in m"],
    B: Float[Tensor, "C m d_out"],
    other_A: Float[Tensor, "D d_in n"],
    other_B: Float[Tensor, "D n d_out"],
) -> Float[Tensor, "C D"]:
    """<A_c B_c , A'_e B'_e> = Σ (A_cᵀ A'_e) ∘ (B_c B'_eᵀ), without building a component."""
    left, right = rearrange(other_A, "D d_in n -> d_in (D n)"), rearrange(other_B, "D n d_out -> d_out (D n)")
    at_once = fitting(8 * 4 * A.shape[2] * left.shape[1])
    parts = [
        ((a.mT @ left) * (b @ right)).sum(1).unflatten(1, (len(other_A), -1)).sum(2)
        for a, b in zip(A.split(at_once), B.split(at_once), strict=True)
    ]
    return torch.cat(parts)


def share_of_units(A: Float[Tensor, "C d_in m"], B: Float[Tensor, "C m d_out"]) -> Float[Tensor, "C d_out"]:
    squares = column_squares(A, B)
    return squares / squares.sum(0).clamp_min(torch.finfo(squares.dtype).tiny)


@full_precision()
def column_squares(A: Float[Tensor, "C d_in m"], B: Float[Tensor, "C m d_out"]) -> Float[Tensor, "C d_out"]:
    """‖P_c[:, j]‖² = bᵀ (Aᵀ A) b for every column b of B, without building A @ B."""
    return einsum(B, A.mT @ A, B, "C m d_out, C m n, C n d_out -> C d_out")
