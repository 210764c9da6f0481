"""Stability: whether runs that differ in their seed only find the same components."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apd_lens._block import full_precision, no_grad
from apd_lens._errors import InvalidSetting, ShapeMismatch
from apd_lens._table import Printed, example_of, frame, short_names, table
from apd_lens.components._components import ParameterComponents
from apd_lens.components._factors import inner_products, sum_of_components
from apd_lens.components._measures import random_components
from apd_lens.decomposition._decomposition import Decomposition

if TYPE_CHECKING:
    from pandas import DataFrame

_COLUMNS = ("best cosine", "lowest pair", "null", "highest pair")


@dataclass(frozen=True, eq=False, repr=False)
class Stability(Printed):
    """How similar the components of several seeds are. `print` shows the means over pairs of seeds.

    Entry [i, j] is the mean, over the components of seed i, of the best cosine with a component of seed j. The null
    control replaces those of seed j by `random_components` of them.

    Attributes:
        whole, whole_null: with components as vectors over all matrices, each matrix in units of ‖W_l‖.
        matrix, matrix_null: name -> the same in that matrix alone.
    """

    whole: Float[Tensor, "S S"]
    whole_null: Float[Tensor, "S S"]
    matrix: dict[str, Tensor]
    matrix_null: dict[str, Tensor]

    @property
    def mean(self) -> float:
        """Over ordered pairs of different seeds, all matrices together."""
        return _between_seeds(self.whole).mean().item()

    @property
    def null(self) -> float:
        """`mean`, of the null control."""
        return _between_seeds(self.whole_null).mean().item()

    def table(self) -> "DataFrame":
        """One row for all matrices together and one for each: means, lowest and highest over ordered pairs of seeds."""
        rows = self._rows()
        columns = dict(zip(_COLUMNS, zip(*rows.values(), strict=True), strict=True))
        return frame({"matrix": list(rows), **columns})

    def _rows(self) -> dict[str, tuple[float, ...]]:
        rows = {"all": _row(self.whole, self.whole_null)}
        return rows | {name: _row(self.matrix[name], self.matrix_null[name]) for name in self.matrix}

    def _parts(self) -> list[str]:
        names = list(self.matrix)
        short = short_names(names)
        numbers = [[f"{value:.4f}" for value in row] for row in self._rows().values()]
        rows = [(name, *row) for name, row in zip(["all", *short], numbers, strict=True)]
        of_rows = table(("matrix", *_COLUMNS), rows, dict(zip(short, names, strict=True)))
        return [of_rows, f"{len(self.whole)} seeds, mean over their ordered pairs", *example_of(short, names)]


@no_grad()
@full_precision()
def stability(
    decompositions: Sequence[Decomposition] | Sequence[ParameterComponents],
    *,
    alive: Sequence[Bool[Tensor, " C"]] | None = None,
) -> Stability:
    """Mean max cosine similarity between the components of every pair of seeds.

    Σ_c ‖P_c‖ max_e cos(P_c, Q_e) / Σ_c ‖P_c‖ for components P of one seed and Q of the other, in parameter space: 1 if
    the other seed has every component too, in any order and of any size. A component counts by its norm, so that one
    that has shrunk to nothing does not. A dead one need not be small: `alive` leaves it out. Where components cancel
    each other, or hold what the data never uses, expect low numbers.

    Args:
        decompositions: of the same matrices of one model, at least two. Matrices are scaled by the norms of the
            target's, or where only components are given, of the first ones' sum.
        alive: for each seed the components that count, on both sides; such as
            `decomposition.select(batch).flatten(0, -2).any(0)`. Default all.

    Raises:
        InvalidSetting: fewer than two, or not one `alive` for each.
        ShapeMismatch: components of other matrices than the first ones, or `alive` of another length.
    """
    sets = [some.components if isinstance(some, Decomposition) else some for some in decompositions]
    if len(sets) < 2:
        raise InvalidSetting(f"Stability compares at least two decompositions, got {len(sets)}.")
    _check_same_matrices(sets)
    if alive is None:
        alive = [torch.ones(some.n_components, dtype=torch.bool, device="cpu") for some in sets]
    _check_alive(alive, sets)
    twins = [random_components(components) for components in sets]
    scales = squared_norms(decompositions[0])

    def compare(others: Sequence[ParameterComponents]) -> Float[Tensor, "all_and_matrices S S"]:
        rows = [
            torch.stack(
                [
                    _similarities(one, other, scales, counts, of_other)
                    for other, of_other in zip(others, alive, strict=True)
                ]
            )
            for one, counts in zip(sets, alive, strict=True)
        ]
        return torch.stack(rows).movedim(2, 0).cpu()

    (whole, *of_each), (whole_null, *null_of_each) = compare(sets), compare(twins)
    return Stability(
        whole=whole,
        whole_null=whole_null,
        matrix=dict(zip(scales, of_each, strict=True)),
        matrix_null=dict(zip(scales, null_of_each, strict=True)),
    )


@dataclass(eq=False)
class _Products:
    """Inner products of the components of two sets, and each one's squared norm, in units of ‖W_l‖²."""

    inner: Float[Tensor, "C D"]
    squares: Float[Tensor, " C"]
    of_others: Float[Tensor, " D"]

    @classmethod
    def of(cls, first: ParameterComponents, second: ParameterComponents, name: str, scale: float) -> "_Products":
        A, B, other_A, other_B = first.A[name], first.B[name], second.A[name], second.B[name]
        inner = inner_products(A, B, other_A, other_B)
        return cls(inner / scale, _own_squares(A, B) / scale, _own_squares(other_A, other_B) / scale)

    def add(self, more: "_Products") -> "_Products":
        """In place."""
        for name, values in vars(self).items():
            values += getattr(more, name).to(values.device)
        return self

    def cosines(self) -> tuple[Float[Tensor, "C D"], Float[Tensor, " C"]]:
        """And the norms of the first; 0 where a norm is 0."""
        lengths, others = self.squares.sqrt(), self.of_others.sqrt()
        tiny = torch.finfo(lengths.dtype).tiny
        return self.inner / lengths.clamp_min(tiny)[:, None] / others.clamp_min(tiny), lengths

    def similarity(self, counts: Bool[Tensor, " C"], others_count: Bool[Tensor, " D"]) -> Float[Tensor, ""]:
        found, norms = self.cosines()
        found, norms = found[counts][:, others_count], norms[counts]
        if found.numel() == 0:
            return norms.new_zeros(())
        return (norms * found.max(1).values).sum() / norms.sum().clamp_min(torch.finfo(norms.dtype).tiny)


def cosines(
    first: ParameterComponents, second: ParameterComponents, scales: Mapping[str, float]
) -> Float[Tensor, "C D"]:
    """Cosine of every component of the first with every one of the second, in the named matrices together.

    Args:
        scales: name -> ‖W_l‖²; inner products are Σ_l <P_c,l , Q_e,l> / ‖W_l‖².
    """
    return reduce(_Products.add, (_Products.of(first, second, *of_one) for of_one in scales.items())).cosines()[0]


def _similarities(
    one: ParameterComponents,
    other: ParameterComponents,
    scales: Mapping[str, float],
    counts: Bool[Tensor, " C"],
    others_count: Bool[Tensor, " D"],
) -> Float[Tensor, "all_and_matrices"]:
    """In all matrices together, and in each."""
    of_each, whole = [], None
    for name, scale in scales.items():
        here = _Products.of(one, other, name, scale)
        of_each.append(here.similarity(counts, others_count).cpu())
        whole = here if whole is None else whole.add(here)
    assert whole is not None
    return torch.stack([whole.similarity(counts, others_count).cpu(), *of_each])


def _own_squares(A: Float[Tensor, "C d_in m"], B: Float[Tensor, "C m d_out"]) -> Float[Tensor, " C"]:
    return ((A.mT @ A) * (B @ B.mT)).sum((1, 2)).clamp_min(0)


def squared_norms(decomposition: Decomposition | ParameterComponents) -> dict[str, float]:
    """‖W_l‖² of the target's matrices, or of the components' sums; 1 for a matrix that is 0."""
    if isinstance(decomposition, Decomposition):
        weights = decomposition.target.weights
        squares = {
            name: weights[name].value().double().square().sum().item() for name in decomposition.components.names
        }
    else:
        A, B = decomposition.A, decomposition.B
        squares = {name: sum_of_components(A[name], B[name]).square().sum().item() for name in decomposition.names}
    return {name: square or 1.0 for name, square in squares.items()}


def _between_seeds(values: Float[Tensor, "S S"]) -> Float[Tensor, " pairs"]:
    return values[~torch.eye(len(values), dtype=torch.bool, device="cpu")]


def _row(found: Float[Tensor, "S S"], null: Float[Tensor, "S S"]) -> tuple[float, ...]:
    found, null = _between_seeds(found), _between_seeds(null)
    return tuple(value.item() for value in (found.mean(), found.min(), null.mean(), null.max()))


def _check_same_matrices(sets: Sequence[ParameterComponents]) -> None:
    def shapes(some: ParameterComponents) -> dict[str, tuple[int, int]]:
        return {name: (some.A[name].shape[1], some.B[name].shape[2]) for name in some.names}

    expected = shapes(sets[0])
    for index, some in enumerate(sets):
        if shapes(some) != expected:
            raise ShapeMismatch(
                f"Expected components of the same matrices (d_in, d_out) everywhere: the first ones are of {expected}, "
                f"number {index} of {shapes(some)}."
            )


def _check_alive(alive: Sequence[Tensor], sets: Sequence[ParameterComponents]) -> None:
    if len(alive) != len(sets):
        raise InvalidSetting(f"Expected one `alive` for each of the {len(sets)} decompositions, got {len(alive)}.")
    for index, (counts, some) in enumerate(zip(alive, sets, strict=True)):
        if counts.shape != (some.n_components,):
            raise ShapeMismatch(
                f"Expected alive[{index}] to have an entry for each of {some.n_components} components, got "
                f"{tuple(counts.shape)}."
            )
