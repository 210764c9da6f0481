"""Starts other than random factors."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from apd_lens._block import full_precision, no_grad
from apd_lens.components._components import ParameterComponents
from apd_lens.moves._surgery import refactor

# At the start all factors but the first component's are this much smaller than they would be.
_TINY = 0.01


@no_grad()
@full_precision()
def start_as_a_whole(components: ParameterComponents, weights: Mapping[str, Float[Tensor, "d_in d_out"]]) -> None:
    """Component 0 becomes the weights, or their best approximation of its rank; all others are made tiny."""
    for name, weight in weights.items():
        A, B = components.A[name], components.B[name]
        A.mul_(_TINY)
        B.mul_(_TINY)
        refactor(A, B, 0, weight, torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device))


@no_grad()
@full_precision()
def start_with_matrices(components: ParameterComponents, weights: Mapping[str, Float[Tensor, "d_in d_out"]]) -> None:
    """Component l becomes the whole l-th matrix, or its best approximation of its rank, and nothing in the others."""
    for number, (name, weight) in enumerate(weights.items()):
        for factor in components.factors_of_all:
            factor[number] = 0.0
        refactor(
            components.A[name],
            components.B[name],
            number,
            weight,
            torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device),
        )
