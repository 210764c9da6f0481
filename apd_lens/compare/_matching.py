"""Matches latents with components by a matrix of similarities."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from apd_lens._block import no_grad
from apd_lens._errors import InvalidSetting, ShapeMismatch
from apd_lens._table import Table, Tabled, frame, table


@dataclass(frozen=True, eq=False, repr=False)
class Matching(Tabled):
    """Best matches both ways, a one-to-one assignment, and how many matches each has; on the CPU.

    A unit that does not count (see `matching`), or is left over in the assignment, has NaN, and −1 for its partner.

    Attributes:
        best_of_component, latent: the largest similarity of each component with a latent, and which one.
        best_of_latent, component: the largest similarity of each latent with a component, and which one.
        one_to_one, partner: of each component in the assignment whose sum of similarities is largest.
        latents_above, components_above: with how many the similarity of each is above the threshold.
        threshold: from which on two count as a match.
    """

    best_of_component: Float[Tensor, " C"]
    latent: Int[Tensor, " C"]
    best_of_latent: Float[Tensor, " latents"]
    component: Int[Tensor, " latents"]
    one_to_one: Float[Tensor, " C"]
    partner: Int[Tensor, " C"]
    latents_above: Int[Tensor, " C"]
    components_above: Int[Tensor, " latents"]
    threshold: float

    @property
    def numbers(self) -> dict[str, float]:
        """Means over the units that count, by name; an assignment's is over its pairs."""
        components, latents = self.latent >= 0, self.component >= 0
        t = f"{self.threshold:g}"

        def share(above: Int[Tensor, " n"], counts: Bool[Tensor, " n"], least: int) -> float:
            return (above[counts] >= least).double().mean().item()

        return {
            "best latent of a component": self.best_of_component.nanmean().item(),
            "best component of a latent": self.best_of_latent.nanmean().item(),
            "one to one": self.one_to_one.nanmean().item(),
            f"components with a match above {t}": share(self.latents_above, components, 1),
            "    with several (split)": share(self.latents_above, components, 2),
            f"latents with a match above {t}": share(self.components_above, latents, 1),
            "    with several": share(self.components_above, latents, 2),
        }

    def of_pairs(self, similarity: Float[Tensor, "C latents"], seed: int = 0) -> tuple[float, float]:
        """Mean over the one-to-one pairs of another similarity, which they were not chosen by, and of the same pairs
        with their latents exchanged at random. So directions and activity can be checked against each other.

        Raises:
            ShapeMismatch: of other components or latents.
        """
        if similarity.shape != (len(self.partner), len(self.component)):
            expected = (len(self.partner), len(self.component))
            raise ShapeMismatch(f"Expected a similarity of shape {expected}, got {tuple(similarity.shape)}.")
        rows = (self.partner >= 0).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed), device="cpu")]
        columns = self.partner[rows]
        found, exchanged = (similarity.cpu()[rows, some].mean().item() for some in (columns, columns.roll(1)))
        return found, exchanged

    def table(self, of: Literal["component", "latent"] = "component") -> pd.DataFrame:
        """One row for each component, or latent, that counts."""
        if of == "latent":
            columns = {
                "latent": torch.arange(len(self.component), device="cpu"),
                "best component": self.component,
                "similarity": self.best_of_latent,
                "components above": self.components_above,
            }
            return _frame(columns, self.component >= 0)
        columns = {
            "component": torch.arange(len(self.latent), device="cpu"),
            "best latent": self.latent,
            "similarity": self.best_of_component,
            "one to one": self.partner,
            "its similarity": self.one_to_one,
            "latents above": self.latents_above,
        }
        return _frame(columns, self.latent >= 0)


@no_grad()
def matching(
    similarity: Float[Tensor, "C latents"],
    threshold: float = 0.7,
    components: Bool[Tensor, " n_components"] | None = None,
    latents: Bool[Tensor, " n_latents"] | None = None,
) -> Matching:
    """Finds the best matches both ways, and the one-to-one assignment with the largest sum (scipy's
    linear_sum_assignment).

    Args:
        components, latents: which ones count; default all. Dead ones match by chance only.

    Raises:
        ShapeMismatch: `components` or `latents` of another length.
        InvalidSetting: none of them count.

    >>> found = matching(torch.tensor([[0.9, 0.8, 0.0], [1.0, 0.1, 0.0]]))
    >>> found.latent.tolist(), found.partner.tolist(), found.latents_above.tolist()
    ([0, 0], [1, 0], [2, 1])
    """
    C, L = similarity.shape
    rows, columns = _counted(components, C, "components"), _counted(latents, L, "latents")
    some = similarity.cpu()[rows][:, columns]

    def spread(values: Tensor, places: Int[Tensor, " n"], length: int, other: float) -> Tensor:
        return torch.full((length,), other, dtype=values.dtype, device="cpu").index_copy_(0, places, values)

    best, latent = some.max(1)
    best_of_latent, component = some.max(0)
    row, column = (torch.from_numpy(index) for index in linear_sum_assignment(some.numpy(), maximize=True))
    above = some > threshold
    return Matching(
        best_of_component=spread(best, rows, C, torch.nan),
        latent=spread(columns[latent], rows, C, -1),
        best_of_latent=spread(best_of_latent, columns, L, torch.nan),
        component=spread(rows[component], columns, L, -1),
        one_to_one=spread(some[row, column], rows[row], C, torch.nan),
        partner=spread(columns[column], rows[row], C, -1),
        latents_above=spread(above.sum(1), rows, C, 0),
        components_above=spread(above.sum(0), columns, L, 0),
        threshold=threshold,
    )


def side_by_side(kinds: Mapping[str, Matching]) -> Table:
    """A row for each number, a column for each kind of match: what was found, and its nulls."""
    numbers = {kind: found.numbers for kind, found in kinds.items()}
    names = next(iter(numbers.values()))
    rows = [(name, *(f"{of_kind[name]:.3f}" for of_kind in numbers.values())) for name in names]
    return table(("mean, or share", *numbers), rows)


def with_null(frame: pd.DataFrame, **nulls: Matching) -> pd.DataFrame:
    """The table of what was found, with the mean best similarity of its nulls in columns of their own."""
    means = {f"null: {name.replace('_', ' ')}": null.best_of_component.nanmean().item() for name, null in nulls.items()}
    return frame.assign(**means)


def _counted(counts: Bool[Tensor, " given"] | None, n: int, what: str) -> Int[Tensor, " counted"]:
    if counts is None:
        return torch.arange(n, device="cpu")
    if counts.shape != (n,):
        raise ShapeMismatch(f"Expected an entry for each of the {n} {what}, got {tuple(counts.shape)}.")
    if not counts.any():
        raise InvalidSetting(f"None of the {n} {what} counts, so there is nothing to match.")
    return counts.cpu().nonzero()[:, 0]


def _frame(columns: Mapping[str, Tensor], counts: Bool[Tensor, " n"]) -> pd.DataFrame:
    return frame({name: values[counts] for name, values in columns.items()})
