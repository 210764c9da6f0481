"""Losses of the weights alone: faithfulness and simplicity."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apd_lens.components._factors import side_by_side, sum_of_components

# Added under a root so that its gradient is finite at zero; as in the paper's implementation.
_EPS = 1e-16


def faithfulness_loss(weight: Float[Tensor, "d_in d_out"], summed: Float[Tensor, "d_in d_out"]) -> Float[Tensor, ""]:
    """‖W − Σ_c P_c‖²: squared distance between one matrix and the sum of its components.

    The sum over entries, in squared units of the weights. The caller sums over matrices and divides.

    >>> faithfulness_loss(torch.eye(2), torch.zeros(2, 2))
    tensor(2.)
    """
    return (weight - summed).square().sum()


def simplicity_loss(
    A: Float[Tensor, "C d_in m"],
    B: Float[Tensor, "C m d_out"],
    mask: Float[Tensor, "batch *pos C"] | Bool[Tensor, "batch *pos C"],
    p: float,
    floor: float = 0.0,
) -> Float[Tensor, ""]:
    """mean over data points Σ_c s_c Σ_m (‖A_c[:, m]‖² ‖B_c[m, :]‖²)^(p/2), for one matrix.

    This bounds the Schatten-p norms to the p of the active components from above, and equals them where the m parts are
    orthogonal. The mask enters only through how often each component was active. The caller sums over matrices and
    divides.

    Args:
        mask: s_c, or A_c^p in the Lp form.
        floor: added to how often each component was active, as a share of the mean over components.
    """
    return _simplicity(_squared_norms(A.mT), _squared_norms(B), mask, p, floor)


def _simplicity(
    squares_A: Float[Tensor, "C m"], squares_B: Float[Tensor, "C m"], mask: Tensor, p: float, floor: float
) -> Float[Tensor, ""]:
    activity = mask.to(squares_A.dtype).flatten(0, -2).mean(0)
    activity = activity + floor * activity.mean()
    return (activity * (squares_A * squares_B + _EPS).pow(p / 2).sum(1)).sum()


def weight_losses(
    weight: Float[Tensor, "d_in d_out"],
    A: Float[Tensor, "C d_in m"],
    B: Float[Tensor, "C m d_out"],
    mask: Float[Tensor, "batch *pos C"] | Bool[Tensor, "batch *pos C"],
    p: float,
    floor: float = 0.0,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """`faithfulness_loss` of Σ_c A_c B_c and `simplicity_loss`, for one matrix, in one pass over the factors."""
    rest, squares_A, squares_B = _RestAndSquaredNorms.apply(weight, A, B)
    return rest.square().sum(), _simplicity(squares_A, squares_B, mask, p, floor)


def _squared_norms(vectors: Float[Tensor, "C m d"]) -> Float[Tensor, "C m"]:
    return torch.linalg.vector_norm(vectors, dim=-1).square()


class _RestAndSquaredNorms(torch.autograd.Function):
    """W − Σ_c A_c B_c, ‖A_c[:, m]‖² and ‖B_c[m, :]‖².

    Factors, and so their gradients, are often the largest tensors of a step: the backward pass makes one of each, where
    autograd would make one for each result, and add them up.
    """

    @staticmethod
    def forward(weight: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return weight - sum_of_components(A, B), _squared_norms(A.mT), _squared_norms(B)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        A, B = ctx.saved_tensors
        of_sum, of_squares_A, of_squares_B = -gradients[0], 2 * gradients[1], 2 * gradients[2]
        columns, rows = side_by_side(A, B)
        # In the layout of the parameters; and detached, since to a view autograd adds nothing in place.
        for_A, for_B = (rows @ of_sum.mT).view_as(A.mT).mT.detach(), (columns.mT @ of_sum).view_as(B).detach()
        return None, for_A.addcmul_(of_squares_A[..., None, :], A), for_B.addcmul_(of_squares_B[..., None], B)


def lp_sparsity(attributions: Float[Tensor, "batch *pos C"], p: float) -> Float[Tensor, "batch *pos C"]:
    """A_c^p of every component and data point; its sum over components is the Lp form of minimality."""
    return lp_of_squares(attributions.square(), p)


def lp_of_squares(squares: Float[Tensor, "batch *pos C"], p: float) -> Float[Tensor, "batch *pos C"]:
    """A_c^p from A_c², whose gradient is finite where A_c is 0."""
    return (squares + _EPS).pow(p / 2)
