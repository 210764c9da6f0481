"""A table of components."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from apd_lens._table import WIDTH, Printed, Table, example_of, frame, listed, short_names, table

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, eq=False, repr=False)
class Summary(Printed):
    """A table of components over a batch; `print` shows it.

    Attributes:
        active: share of data points on which each was active, `C`.
        attribution: mean attribution, `C`.
        norm: name -> Frobenius norm in that matrix, `C`.
        effective_rank: name -> exp of the entropy of the normalised singular values, `C`.
        dead_share: name -> ‖Σ P_c of the components that are never active‖ / ‖W‖. No loss keeps them small: they hold
            what faithfulness needs and the data never used.
        rest: name -> ‖W − Σ P_c‖ / ‖W‖, what the components leave to the rest; "all" for all matrices together.
        agreement: of estimated attributions, see `AttributionError`; None where they are exact, or it cannot be told.
    """

    active: Float[Tensor, " C"]
    attribution: Float[Tensor, " C"]
    norm: dict[str, Tensor]
    effective_rank: dict[str, Tensor]
    dead_share: dict[str, float]
    rest: dict[str, float]
    agreement: float | None = None

    @property
    def n_dead(self) -> int:
        """Components that were active on no data point."""
        return int((self.active == 0).sum())

    def table(self) -> "DataFrame":
        """One row for each component, with its norm and effective rank in each matrix."""
        columns = {"active": self.active, "attribution": self.attribution}
        for name in self.norm:
            columns |= {f"‖{name}‖": self.norm[name], f"{name}, effective rank": self.effective_rank[name]}
        return frame(columns).rename_axis("component")

    def _parts(self) -> list[str]:
        order = sorted(range(len(self.active)), key=lambda c: (-self.active[c].item(), -self.attribution[c].item()))
        shown = [c for c in order if self.active[c] > 0]
        short = dict(zip(self.norm, short_names(list(self.norm)), strict=True))
        text = self._with_columns(shown, short)
        if max(map(len, text.splitlines())) > WIDTH:
            text = self._with_largest(shown, short)
        dead = sorted(self.dead_share.items(), key=lambda item: -item[1])
        shares = listed([f"{share:.2f} of ‖{short.get(name, name)}‖" for name, share in dead], 2)
        footer = f"{len(shown)} components active on this batch, {self.n_dead} dead"
        footer += f" (together {shares})" if self.n_dead else ""
        footer += f"\nthe rest W − Σ P: {self.rest['all']:.2g} of ‖W‖"
        if self.agreement is not None:
            footer += f"\nattributions are estimates, whose two halves agree on {self.agreement:.0%} of what is active"
        return [text, footer, *example_of(list(short.values()), list(short))]

    def _with_columns(self, shown: list[int], short: dict[str, str]) -> Table:
        """Two columns for each matrix."""
        header = ["component", "active", "attribution"]
        for name in self.norm:
            header += [f"‖{short[name]}‖", "eff. rank"]
        rows = [
            self._first(c)
            + [f"{of[name][c]:.{n}f}" for name in self.norm for of, n in ((self.norm, 3), (self.effective_rank, 2))]
            for c in shown
        ]
        return table(header, rows, {f"‖{short[name]}‖": name for name in self.norm})

    def _with_largest(self, shown: list[int], short: dict[str, str]) -> Table:
        """One column, with the matrices in which a component has its largest norms."""
        header = ["component", "active", "attribution", "largest norms (effective ranks)"]
        names, rows, whole = list(self.norm), [], {}
        for c in shown:
            largest = sorted(names, key=lambda name: -self.norm[name][c].item())
            parts, others = [], ""
            for i, name in enumerate(largest):
                part = f"{short[name]} {self.norm[name][c]:.3f} ({self.effective_rank[name][c]:.1f})"
                others = f"… {len(names) - i} others"
                if len("  ".join([*parts, part, others])) > WIDTH - 40:
                    break
                parts.append(part)
            else:
                others = ""
            rows.append([*self._first(c), "  ".join([*parts, others]).rstrip()])
            whole[rows[-1][-1]] = ", ".join(largest[: len(parts)])
        return table(header, rows, whole)

    def _first(self, c: int) -> list[str]:
        return [str(c), f"{self.active[c]:.2%}", f"{self.attribution[c]:.4f}"]
