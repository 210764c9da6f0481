"""A table of components."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from apd_lens._table import table


@dataclass(frozen=True, eq=False)
class Summary:
    """A table of components over a batch; `print` shows it.

    Attributes:
        active: share of data points on which each was active, `C`.
        attribution: mean attribution, `C`.
        norm: name -> Frobenius norm in that matrix, `C`.
        effective_rank: name -> exp of the entropy of the normalised singular values, `C`.
        dead_share: name -> ‖Σ P_c of the components that are never active‖ / ‖W‖. No loss keeps them small: they hold
            what faithfulness needs and the data never used.
    """

    active: Float[Tensor, " C"]
    attribution: Float[Tensor, " C"]
    norm: dict[str, Tensor]
    effective_rank: dict[str, Tensor]
    dead_share: dict[str, float]

    @property
    def n_dead(self) -> int:
        """Components that were active on no data point."""
        return int((self.active == 0).sum())

    def __str__(self) -> str:
        header = ["component", "active", "attribution"]
        for name in self.norm:
            header += [f"‖{name}‖", "eff. rank"]
        order = sorted(range(len(self.active)), key=lambda c: (-self.active[c].item(), -self.attribution[c].item()))
        rows = [self._row(c) for c in order if self.active[c] > 0]
        dead = ", ".join(f"{share:.2f} of ‖{name}‖" for name, share in self.dead_share.items())
        footer = f"{len(rows)} components active on this batch, {self.n_dead} dead"
        return f"{table(header, rows)}\n{footer}" + (f" (together {dead})" if self.n_dead else "")

    def _row(self, component: int) -> list[str]:
        row = [str(component), f"{self.active[component]:.2%}", f"{self.attribution[component]:.4f}"]
        for name in self.norm:
            row += [f"{self.norm[name][component]:.3f}", f"{self.effective_rank[name][component]:.2f}"]
        return row

    __repr__ = __str__
