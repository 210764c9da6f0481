"""Directions in output space that are pulled back."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Cotangents:
    """Vectors v in the space of one example's outputs, so that Σ_v (v · e)² is Σ_o e_o² times `scale`.

    Attributes:
        count: how many.
        rows: the ones from first to last, `v *pos n_outputs`.
        scale: number of cotangents that bring as much as one output each.
        exact: not only on average.
        lasting: whether another pass over the same batch gets the same ones.
        at_input: where they are given there and not by rows, the place of a matrix's x among the pass's `inputs`, and
            the gradients at it, `v batch *pos d`.
    """

    count: int
    rows: Callable[[int, int], Tensor]
    scale: int = 1
    exact: bool = True
    lasting: bool = True
    at_input: tuple[int, Tensor] | None = None

    def some(self, first: int, last: int) -> "Cotangents":
        """The ones from first to last."""
        return Cotangents(
            last - first, lambda start, end: self.rows(first + start, first + end), self.scale, False, False
        )

    def of_examples(self, examples: slice) -> "Cotangents":
        """The same for some of the batch."""
        if self.at_input is None:
            return self
        return replace(self, at_input=(self.at_input[0], self.at_input[1][:, examples]))


def one_hot_cotangents(output: Float[Tensor, "batch *pos n_outputs"]) -> Cotangents:
    """One for every output of an example."""

    def rows(first: int, last: int) -> Tensor:
        one_hot = torch.zeros(last - first, output[0].numel(), device=output.device, dtype=output.dtype)
        return one_hot.fill_diagonal_(1).roll(first, 1).unflatten(1, output.shape[1:])

    return Cotangents(output[0].numel(), rows)


def random_cotangents(
    output: Float[Tensor, "batch *pos n_outputs"],
    K: int,
    kind: Literal["rademacher", "normal"],
    generator: torch.Generator | None,
) -> Cotangents:
    """K random ones with E v vᵀ = 1, the same for all examples."""
    shape, device, dtype = (K, *output.shape[1:]), output.device, output.dtype

    @cache
    def drawn() -> Tensor:
        if kind == "normal":
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)
        return torch.randint(2, shape, generator=generator, device=device, dtype=torch.int8).mul_(2).sub_(1)

    return Cotangents(K, lambda first, last: drawn()[first:last].to(dtype), scale=K, exact=False, lasting=False)
