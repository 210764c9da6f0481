"""Columns of A at norm 1."""

from jaxtyping import Float
from torch import Tensor

from apd_lens._block import no_grad
from apd_lens._shards import own_part
from apd_lens.components._components import ParameterComponents


@no_grad()
def normalize_columns(
    components: ParameterComponents, keep_products: bool = True, unless: Float[Tensor, ""] | None = None
) -> None:
    """Divides every column A_c[:, i] by its norm, in place; columns of zeros stay.

    Args:
        keep_products: multiply the row B_c[i, :] by it, so that P_c stays as it was.
        unless: leave all as it is if this is not 0.
    """
    for A, B in zip(map(own_part, components._A_transposed), map(own_part, components._B), strict=True):
        A = A.mT
        norms = A.norm(dim=1, keepdim=True)
        if unless is not None:
            norms.masked_fill_(unless.to(norms.device) != 0, 1)
        A.div_(norms.masked_fill(norms == 0, 1))
        if keep_products:
            B.mul_(norms.mT)


@no_grad()
def remove_parallel_gradients(components: ParameterComponents) -> None:
    """Takes out of the gradient of every column a = A_c[:, i] what points along it: g − a <a, g> / ‖a‖²."""
    for factor in components._A_transposed:
        assert factor.grad is not None
        columns, gradient = own_part(factor), own_part(factor.grad)
        along = (columns * gradient).sum(2, keepdim=True)
        squares = columns.square().sum(2, keepdim=True)
        gradient.sub_(columns * (along / squares.masked_fill(squares == 0, 1)))
