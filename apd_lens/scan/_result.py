"""The result of a scan: a table, a choice, and what a picture needs."""

import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apd_lens._checks import checked
from apd_lens._errors import ApdWarning, InvalidSetting
from apd_lens._table import Printed, example_of, frame, short_names, table

if TYPE_CHECKING:
    from pandas import DataFrame

# Where a place stands on the way from the prompt to the answer.
Side = Literal["source", "sends", "receives", "answer"]
# Rows that `print` shows.
_SHOWN = 20
_WIDEST = 46


@dataclass(frozen=True, eq=False)
class Together:
    """What is lost when several places are ablated in one forward.

    Attributes:
        side: of the places; "answer" for all places at the answer's position.
        places: (row, group), the largest effect first.
        effects: of the first place, the first two, the first three, and so on.
        kept: share of prompts whose most likely answer then stays the same.
        total, total_kept: of all places of that side, measured or not.
        by_answers: whether the answers say how much is lost, if any is; otherwise the metric does.
    """

    side: Side
    places: tuple[tuple[int, int], ...]
    effects: Float[Tensor, " first"]
    kept: Float[Tensor, " first"]
    total: float
    total_kept: float
    by_answers: bool

    def shares(self) -> Float[Tensor, " first"]:
        """Which share of what all places of the side lose is lost with the first ones."""
        by_answers = self.by_answers and self.total_kept < 1
        lost, of_all = (1 - self.kept, 1 - self.total_kept) if by_answers else (self.effects, self.total)
        return lost / of_all if of_all > 0 else torch.zeros_like(lost)

    def fewest(self, share: float) -> tuple[tuple[int, int], ...]:
        """The first places that together lose this share; all of them where they do not."""
        enough = (self.shares() >= share - 1e-6).nonzero()
        return self.places[: int(enough[0]) + 1] if len(enough) else self.places


@dataclass(frozen=True, eq=False, repr=False)
class Where(Printed):
    """Which matrices, at which positions, carry a behaviour. Made by `apd_lens.where`; `print` shows the largest.

    A row is one use of a matrix, a group is a set of positions, a place is a row at a group. The effect of a place is
    how much of the metric is lost, as a mean over prompts, when the matrix's output there is replaced.

    Each place has a side. Direct means: with the outputs of all other matrices held fixed.

    - "source": at another position than the answer's. It makes what that position knows (embeddings, MLPs).
    - "sends": at another position; later positions read its output directly (keys, values).
    - "receives": at the answer's position; it reads directly what others sent (the output of attention).
    - "answer": everything else at the answer's position.

    Attributes:
        names: matrix of each row.
        sites: where in the model each row uses it.
        groups: names of the groups.
        estimated: first-order effects; NaN where there are none.
        measured: measured effects; NaN where none was measured.
        kept: share of prompts whose most likely answer stays the same; NaN where it was not measured.
        n_prompts: number of prompts that have each group.
        before: mean of the metric of the model as it is.
        unit: of the effects.
        moves: rows whose output other positions read directly.
        reads: rows that read other positions' outputs directly.
        at_answer: groups that are the answer's position.
        ends: rows that look up tokens, and the one that gives the explained output.
        together: measured joint effects that `best` chooses by.
        skipped: matrices that were not scanned, and why.
        n_forward, n_backward: passes that were run; one in which a batch is replicated n times counts as n.
    """

    names: tuple[str, ...]
    sites: tuple[str, ...]
    groups: tuple[str, ...]
    estimated: Float[Tensor, "row group"]
    measured: Float[Tensor, "row group"]
    kept: Float[Tensor, "row group"]
    n_prompts: Int[Tensor, " group"]
    before: float
    unit: str
    moves: Bool[Tensor, " row"]
    reads: Bool[Tensor, " row"]
    at_answer: Bool[Tensor, " group"]
    ends: frozenset[int] = frozenset()
    together: tuple[Together, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    n_forward: int = 0
    n_backward: int = 0

    @staticmethod
    @checked
    def from_effects(
        effects: Float[Tensor, "node position"],
        names: Sequence[str],
        positions: Sequence[str] | None = None,
        *,
        unit: str = "",
    ) -> "Where":
        """The same for effects that you have measured, such as TransformerLens's patching results.

        Args:
            effects: how much is lost at each node and position; larger is more. Turn the sign round, or subtract from
                the clean value, where a result says how much is left.
            names: of the nodes; to give `best` to `decompose`, names of matrices.
            positions: their names; default their indices. The last is taken for the answer's.
            unit: of the effects.

        Raises:
            InvalidSetting: not as many names as nodes, or as positions.
        """
        n_nodes, n_positions = effects.shape
        positions = [str(place) for place in range(n_positions)] if positions is None else positions
        if len(names) != n_nodes or len(positions) != n_positions:
            raise InvalidSetting(
                f"Expected {n_nodes} names and {n_positions} positions for effects of shape {tuple(effects.shape)}, "
                f"got {len(names)} and {len(positions)}."
            )
        effects = effects.detach().to("cpu", torch.float32)
        unknown = torch.full_like(effects, torch.nan)
        none = torch.zeros(n_nodes, dtype=torch.bool, device="cpu")
        return Where(
            names=tuple(names),
            sites=tuple(names),
            groups=tuple(positions),
            estimated=unknown,
            measured=effects,
            kept=unknown,
            n_prompts=torch.zeros(n_positions, dtype=torch.int64, device="cpu"),
            before=float("nan"),
            unit=unit,
            moves=none,
            reads=none,
            at_answer=torch.arange(n_positions, device="cpu") == n_positions - 1,
        )

    def side(self, row: int, group: int) -> Side:
        """Where a place stands on the way from the prompt to the answer."""
        if bool(self.at_answer[group]):
            return "receives" if bool(self.reads[row]) else "answer"
        return "sends" if bool(self.moves[row]) else "source"

    def order(self) -> list[tuple[int, int]]:
        """All places: the measured ones by measured effect, then the others by the size of the estimate."""
        measured = self.measured.nan_to_num(-torch.inf).flatten()
        estimated = self.estimated.abs().nan_to_num(-1).flatten()
        places = sorted(range(len(measured)), key=lambda place: (-float(measured[place]), -float(estimated[place])))
        return [divmod(place, len(self.groups)) for place in places]

    def labels(self) -> list[str]:
        """A short name for each row, as a summary has it; the site is added where one matrix has several uses."""
        short = short_names(self.names)
        return [
            f"{name} @ {site}" if self.names.count(self.names[row]) > 1 else name
            for row, (name, site) in enumerate(zip(short, self.sites, strict=True))
        ]

    def best(self, share: float = 0.9) -> list[str]:
        """Names of the matrices that carry the behaviour, for `decompose(weights=...)`.

        The rule is in plain words in the guide "Where a behaviour is". Its choice is `carriers(share)`.

        Raises:
            InvalidSetting: the share is not above 0 and at most 1, or there is no effect.
        """
        rows = {row for row, _ in self.carriers(share)}
        return list(dict.fromkeys(name for row, name in enumerate(self.names) if row in rows))

    def carriers(self, share: float = 0.9) -> list[tuple[int, int]]:
        """The places, (row, group), that `best` takes the matrices from.

        These are the fewest places, in the order of their effects, that together lose this share of what all places of
        their side lose. If what the answer's position receives makes up half or more of what it does, these are places
        that send and places that receive; otherwise these are places at the answer's position. Without joint effects
        (`Where.from_effects`) these are the fewest whose effects add up to this share of all effects above 0.

        Raises:
            InvalidSetting: the share is not above 0 and at most 1, or there is no effect.
        """
        if not 0 < share <= 1:
            raise InvalidSetting(f"best takes a share above 0 and at most 1, got {share}.")
        chosen: list[tuple[int, int]] = []
        for each in self.together:
            chosen += each.fewest(share)
            reached = float(each.shares().max()) if len(each.places) else 0.0
            if reached < share - 1e-6:
                warnings.warn(
                    f"The {len(each.places)} places on the side {each.side!r} that were looked at together lose the "
                    f"share {reached:.2g} of what all places of that side lose, less than {share:g}. Give where(..., "
                    "measure=) more places.",
                    ApdWarning,
                    stacklevel=3,
                )
        if not self.together:
            effects = self.measured.nan_to_num().clamp_min(0)
            summed = 0.0
            for row, group in self.order():
                if summed >= share * float(effects.sum()) or not effects[row, group]:
                    break
                chosen.append((row, group))
                summed += float(effects[row, group])
        if not chosen:
            raise InvalidSetting("No place has an effect above 0, so none carries the behaviour. Look at the prompts.")
        return chosen

    def only(self, rows: Sequence[int] | None = None, groups: Sequence[str] | None = None) -> "Where":
        """The result for some rows and groups alone, without joint effects."""
        rows = range(len(self.names)) if rows is None else rows
        kept = range(len(self.groups)) if groups is None else [self.groups.index(name) for name in groups]
        of_rows, of_groups = torch.tensor(list(rows), device="cpu"), torch.tensor(list(kept), device="cpu")

        def of(values: Float[Tensor, "row group"]) -> Float[Tensor, "some_rows some_groups"]:
            return values[of_rows][:, of_groups]

        return replace(
            self,
            names=tuple(self.names[row] for row in rows),
            sites=tuple(self.sites[row] for row in rows),
            groups=tuple(self.groups[group] for group in kept),
            estimated=of(self.estimated),
            measured=of(self.measured),
            kept=of(self.kept),
            n_prompts=self.n_prompts[of_groups],
            moves=self.moves[of_rows],
            reads=self.reads[of_rows],
            at_answer=self.at_answer[of_groups],
            ends=frozenset(new for new, row in enumerate(rows) if row in self.ends),
            together=(),
        )

    def table(self) -> "DataFrame":
        """A row for each place, in the order of `order`.

        Raises:
            MissingExtra: pandas is not installed.
        """
        places = self.order()
        rows, groups = zip(*places, strict=True)
        return frame(
            {
                "matrix": [self.names[row] for row in rows],
                "site": [self.sites[row] for row in rows],
                "position": [self.groups[group] for group in groups],
                "side": [self.side(*place) for place in places],
                "estimated": self.estimated[rows, groups],
                "measured": self.measured[rows, groups],
                "answers kept": self.kept[rows, groups],
                "prompts": self.n_prompts[list(groups)],
            }
        )

    def _parts(self) -> list[str]:
        labels, places = self.labels(), self.order()
        unit = f", {self.unit}" if self.unit else ""
        header = ("matrix", "position", "side", f"estimated{unit}", f"measured{unit}", "answers kept")
        rows = [
            (
                _cut(labels[row], _WIDEST),
                _cut(self.groups[group], 16),
                self.side(row, group),
                _number(self.estimated[row, group]),
                _number(self.measured[row, group]),
                "-" if self.kept[row, group].isnan() else f"{100 * float(self.kept[row, group]):.0f} %",
            )
            for row, group in places[:_SHOWN]
        ]
        whole = {row[0]: self.names[of] for row, (of, _) in zip(rows, places, strict=False)}
        return [table(header, rows, whole), "\n".join(self._footer(len(places) - len(rows)))]

    def _footer(self, n_more: int) -> list[str]:
        n_measured = int((~self.measured.isnan()).sum())
        lines = [f"{n_measured} of {self.measured.numel()} places measured, {max(0, n_more)} not shown."]
        labels, unit = self.labels(), f" {self.unit}" if self.unit else ""
        for each in self.together:
            chosen = each.fewest(0.9)
            if chosen:
                words = ", ".join(f"{labels[row]} at {self.groups[group]}" for row, group in chosen[:3])
                words += f" and {len(chosen) - 3} more" if len(chosen) > 3 else ""
                lost, kept = float(each.effects[len(chosen) - 1]), 100 * float(each.kept[len(chosen) - 1])
                lines.append(
                    f"{each.side}: {words} ablated lose {lost:.3g}{unit} and keep {kept:.0f} % of the answers; all of "
                    f"this side lose {each.total:.3g}{unit} and keep {100 * each.total_kept:.0f} %."
                )
        if self.skipped:
            lines.append(f"Not scanned: {len(self.skipped)} matrices, see .skipped.")
        lines += example_of(short_names(self.names), self.names)
        return [part for line in lines for part in _wrapped(line)]


def _cut(name: str, width: int) -> str:
    """The end of a long name."""
    return name if len(name) <= width else f"…{name[-width + 1 :]}"


def _number(value: Tensor) -> str:
    return "-" if value.isnan() else f"{float(value):.3f}"


def _wrapped(line: str, width: int = 118) -> list[str]:
    return textwrap.wrap(line, width, break_long_words=False) or [line]
