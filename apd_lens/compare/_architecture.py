"""Where components lie in the architecture: shares of their weight and of their attribution, by matrix, layer, head,
MLP and neuron; and back: which components make up a head.

Nodes are named as circuits are: head 7 of layer 3 is "a3.7", the MLP "m3", neuron 12 of it "m3.12".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from apd_lens._block import no_grad
from apd_lens._errors import InvalidSetting
from apd_lens._table import WIDTH, Printed, example_of, listed, short_names, table
from apd_lens.compare._nodes import Level, layer_of, node_name, unit_numbers, units_by_name
from apd_lens.components._factors import column_squares
from apd_lens.decomposition._decomposition import Decomposition
from apd_lens.host._matrix import Units

# Components that a printed map shows.
_SHOWN = 16


@dataclass(frozen=True, eq=False)
class MatrixAmounts:
    """How much of each component lies in one matrix.

    Attributes:
        name: of the matrix.
        units: its heads or neurons, None where it has none that are known.
        total: squared norm ‖P_c,l‖², or mean over data points of the squared attribution through this matrix alone.
        of_units: how `total` splits over the units. The last row of a matrix with its bias belongs to no head.
    """

    name: str
    units: Units | None
    total: Float[Tensor, " C"]
    of_units: Float[Tensor, "C units"] | None

    @property
    def layer(self) -> int | None:
        return layer_of(self.name)


@dataclass(frozen=True, eq=False, repr=False)
class ArchitectureMap(Printed):
    """Where components lie. The same amounts are summed by matrix, layer, head, MLP or neuron.

    Keys and values that several query heads share are divided equally among these heads.

    Attributes:
        measure: what the amounts measure, see `MatrixAmounts.total`.
        matrices: in the order of `components.names`.
    """

    measure: Literal["weight", "attribution"]
    matrices: tuple[MatrixAmounts, ...]

    def nodes(self, level: Level) -> list[str]:
        """Names: of matrices as the user types them, layers "3" ("-" for matrices of no layer), heads "a3.7", MLPs
        "m3", neurons "m3.12". Empty if there are none."""
        return list(self._amounts(level))

    def amounts(self, level: Level) -> Float[Tensor, "C nodes"]:
        """How much of each component lies in each node, in squared units of the measure."""
        amounts = self._amounts(level)
        if not amounts:
            raise InvalidSetting(
                f"None of the decomposed matrices has {level}s that are known: {[m.name for m in self.matrices]}. "
                "Those of a transformer_lens model are, and of a Hugging Face model whose config says them; for others "
                "say where they are with units={pattern: apd_lens.host.Units(...)}."
            )
        return torch.stack(list(amounts.values()), 1)

    def shares(self, level: Level) -> Float[Tensor, "C nodes"]:
        """The share of each component that lies in each node. Rows sum to 1, or to less where a part of the component
        lies in matrices without heads or neurons. A component of norm 0 has zeros."""
        total = torch.stack([matrix.total for matrix in self.matrices]).sum(0)
        return self.amounts(level) / total.clamp_min(torch.finfo(total.dtype).tiny)[:, None]

    def spread(self, level: Level) -> Float[Tensor, " C"]:
        """Over how many nodes each component spreads: exp of the entropy of its shares, scaled to sum to 1. It is 1 for
        a component in a single node and 0 for one in none."""
        amounts = self.amounts(level)
        total = amounts.sum(1, keepdim=True)
        shares = amounts / total.clamp_min(torch.finfo(amounts.dtype).tiny)
        return torch.special.entr(shares).sum(1).exp() * (total[:, 0] > 0)

    def table(self, level: Level = "matrix") -> pd.DataFrame:
        """One row for each component: the node that holds most of it, the share there, the spread, and all shares."""
        shares, nodes = self.shares(level).cpu(), self.nodes(level)
        table = pd.DataFrame(shares.numpy(), columns=nodes)
        largest = shares.max(1)
        table.insert(0, f"largest {level}", [nodes[node] for node in largest.indices.tolist()])
        table.insert(1, "its share", largest.values.numpy())
        table.insert(
            2, f"{'matrices' if level == 'matrix' else level + 's'}, effectively", self.spread(level).cpu().numpy()
        )
        return table.rename_axis("component")

    def _parts(self) -> list[str]:
        """The matrices that hold most of all components together, and for the largest components where they lie."""
        totals = torch.stack([matrix.total for matrix in self.matrices]).cpu()
        names = short_names([matrix.name for matrix in self.matrices])
        of_all = totals.sum(1) / totals.sum().clamp_min(torch.finfo(totals.dtype).tiny)
        largest = of_all.argsort(descending=True).tolist()
        held = listed([f"{names[i]} {of_all[i]:.0%}" for i in largest], 4)
        n, C = totals.shape
        shares = totals / totals.sum(0).clamp_min(torch.finfo(totals.dtype).tiny)
        rows = []
        for c in totals.sum(0).argsort(descending=True)[:_SHOWN].tolist():
            first = shares[:, c].argsort(descending=True)[:4].tolist()
            most = "  ".join(f"{names[i]} {shares[i, c]:.0%}" for i in first)
            rows.append([str(c), f"{totals[:, c].sum():.3g}", most[: WIDTH - 30]])
        lines = [f"{C} components over {n} matrices, by {self.measure}", f"of all together: {held}"]
        lines.append(table(["component", self.measure, "largest shares"], rows))
        lines += example_of(names, [matrix.name for matrix in self.matrices])
        if C > _SHOWN:
            lines.append(f"and {C - _SHOWN} smaller components; .table() has all")
        return lines

    def _amounts(self, level: Level) -> dict[str, Float[Tensor, " C"]]:
        if level == "matrix":
            return {matrix.name: matrix.total for matrix in self.matrices}
        amounts: dict[str, Tensor] = {}

        def add(node: str, amount: Tensor) -> None:
            amounts[node] = amounts[node] + amount if node in amounts else amount

        if level == "layer":
            for matrix in self.matrices:
                add("-" if matrix.layer is None else str(matrix.layer), matrix.total)
            return amounts
        in_layer: dict[int | None, list[Tensor]] = {}
        for matrix in self.matrices:
            if matrix.units is not None and matrix.of_units is not None:
                if matrix.units.kind == level:
                    in_layer.setdefault(matrix.layer, []).append(matrix.of_units)
                elif level == "mlp" and matrix.units.kind == "neuron":
                    add(f"m{'' if matrix.layer is None else matrix.layer}", matrix.total)
        for layer, here in in_layer.items():
            number = max(of_units.shape[1] for of_units in here)
            for of_units in here:
                group = number // of_units.shape[1]
                for unit, amount in enumerate(of_units.repeat_interleave(group, 1).unbind(1)):
                    add(node_name("head" if level == "head" else "neuron", layer, unit), amount / group)
        return amounts


def weight_map(decomposition: Decomposition, units: Mapping[str, Units] | None = None) -> ArchitectureMap:
    """Where the weights of each component lie: its squared norm by matrix, layer, head and neuron.

    The null: `replace(decomposition, components=apd_lens.components.random_components(decomposition.components))`.

    Args:
        units: pattern -> which side of the matching matrices is made of heads or neurons, where the adapter cannot know
            it (modules of your own): {"layers.*.attention.qkv.weight": Units("head", "out", 12, copies=3)}.

    Raises:
        UnknownWeight: a pattern matches no matrix.
        InvalidSetting: a side cannot be cut into so many blocks.
    """
    known = units_by_name(decomposition.target, decomposition.components.names, units)
    return ArchitectureMap(
        "weight", tuple(_weight_amounts(decomposition, name, known[name]) for name in decomposition.components.names)
    )


@no_grad()
def _weight_amounts(decomposition: Decomposition, name: str, units: Units | None) -> MatrixAmounts:
    A, B = decomposition.components.A[name], decomposition.components.B[name]
    if units is None:
        return MatrixAmounts(name, None, column_squares(A, B).sum(1), None)
    squares = column_squares(A, B) if units.side == "out" else column_squares(B.mT, A.mT)
    numbers = unit_numbers(units, squares.shape[1]).to(squares.device)
    of_units = squares.new_zeros(len(squares), units.number + 1).index_add_(1, numbers, squares)
    return MatrixAmounts(name, units, squares.sum(1), of_units[:, : units.number])
