"""Where components lie in the architecture: shares of their weight and of their attribution, by matrix, layer, head,
MLP and neuron; and back: which components make up a head.

Nodes are named as circuits are: head 7 of layer 3 is "a3.7", the MLP "m3", neuron 12 of it "m3.12".
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from apd_lens._attribution import (
    GradientAttribution,
    Granularity,
    effects_of_calls,
    mean_over_outputs,
    metric_gradients,
)
from apd_lens._batches import Batch, one_pass
from apd_lens._components import ParameterComponents, column_squares
from apd_lens._decomposition import Decomposition
from apd_lens._errors import InvalidSetting
from apd_lens._jacobian import Jacobians, jacobians_in_parts
from apd_lens._passes import Call, WatchedPass
from apd_lens._product import inner_activations
from apd_lens._target import TargetModel, Units, evaluating

# The explained output -> one scalar an example, `batch`; or (output, batch) -> that, where the scalar depends on the
# batch too, such as the logit of the right token. The batch is what the model is called with, on its device.
Metric = Callable[[Tensor], Tensor] | Callable[[Tensor, Any], Tensor]

Level = Literal["matrix", "layer", "head", "mlp", "neuron"]


def layer_of(name: str) -> int | None:
    """The layer of a matrix: the first part of its name that is a number; None if there is none.

    >>> layer_of("blocks.3.attn.W_Q"), layer_of("transformer.h.11.mlp.c_fc.weight"), layer_of("embed.W_E")
    (3, 11, None)
    """
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


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


@dataclass(frozen=True, eq=False)
class ArchitectureMap:
    """Where components lie. At each level, matrix, layer, head, MLP or neuron, the same amounts are summed by node.

    Keys and values that several query heads share count for each of these in equal parts.

    Attributes:
        measure: what is shared out, see `MatrixAmounts.total`.
        matrices: in the order of `components.names`.
    """

    measure: Literal["weight", "attribution"]
    matrices: tuple[MatrixAmounts, ...]

    def nodes(self, level: Level) -> list[str]:
        """Names: of matrices as the user types them, layers "3" ("-" for matrices of no layer), heads "a3.7", MLPs
        "m3", neurons "m3.12". Empty if there are none."""
        return list(self._amounts(level))

    def amounts(self, level: Level) -> Float[Tensor, "C nodes"]:
        """How much of each component lies in each node; squared units of the measure."""
        amounts = self._amounts(level)
        if not amounts:
            raise InvalidSetting(
                f"None of the decomposed matrices has {level}s that are known: {[m.name for m in self.matrices]}. A "
                "transformer_lens model's are; for others say where they are with units={pattern: apd_lens.Units(...)}."
            )
        return torch.stack(list(amounts.values()), 1)

    def shares(self, level: Level) -> Float[Tensor, "C nodes"]:
        """Of each component the share that lies in each node. Rows sum to 1, or to less where some of the component
        lies in matrices without heads or neurons; a component of nothing has zeros."""
        total = torch.stack([matrix.total for matrix in self.matrices]).sum(0)
        return self.amounts(level) / total.clamp_min(torch.finfo(total.dtype).tiny)[:, None]

    def makeup(self, level: Level) -> Float[Tensor, "C nodes"]:
        """The way back, which components make up a node: of each node the share that each component holds, of the sum
        over components. Columns sum to 1; a node of nothing has zeros."""
        amounts = self.amounts(level)
        return amounts / amounts.sum(0).clamp_min(torch.finfo(amounts.dtype).tiny)

    def spread(self, level: Level) -> Float[Tensor, " C"]:
        """Over how many nodes each component spreads: exp of the entropy of its shares, which are scaled to sum to 1;
        1 where it lies in a single one, 0 where it lies in none."""
        amounts = self.amounts(level)
        total = amounts.sum(1, keepdim=True)
        shares = amounts / total.clamp_min(torch.finfo(amounts.dtype).tiny)
        return torch.special.entr(shares).sum(1).exp() * (total[:, 0] > 0)

    def table(self, level: Level = "matrix") -> pd.DataFrame:
        """One row a component: the node in which most of it lies, that share, the spread, and all shares."""
        shares, nodes = self.shares(level).cpu(), self.nodes(level)
        table = pd.DataFrame(shares.numpy(), columns=nodes)
        largest = shares.max(1)
        table.insert(0, f"largest {level}", [nodes[node] for node in largest.indices.tolist()])
        table.insert(1, "its share", largest.values.numpy())
        table.insert(
            2, f"{'matrices' if level == 'matrix' else level + 's'}, effectively", self.spread(level).cpu().numpy()
        )
        return table.rename_axis("component")

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


def node_name(level: Literal["head", "neuron"], layer: int | None, unit: int) -> str:
    """Of a head "a3.7", of a neuron "m3.12"; "a7" and "m12" in a model without layers."""
    return f"{'a' if level == 'head' else 'm'}{'' if layer is None else f'{layer}.'}{unit}"


def weight_map(decomposition: Decomposition, units: Mapping[str, Units] | None = None) -> ArchitectureMap:
    """Where the weights of each component lie: its squared norm by matrix, layer, head and neuron.

    The null: `dataclasses.replace(decomposition, components=apd_lens.random_components(decomposition.components))`.

    Args:
        units: pattern -> which side of the matching matrices is made of heads or neurons, where the adapter cannot know
            it (Hugging Face modules): {"transformer.h.*.attn.c_attn.weight": Units("head", "out", 12, copies=3)}.

    Raises:
        UnknownWeight: a pattern matches no matrix.
        InvalidSetting: a side cannot be cut into so many blocks.
    """
    known = units_by_name(decomposition.target, decomposition.components.names, units)
    return ArchitectureMap(
        "weight", tuple(_weight_amounts(decomposition, name, known[name]) for name in decomposition.components.names)
    )


@torch.no_grad()
def _weight_amounts(decomposition: Decomposition, name: str, units: Units | None) -> MatrixAmounts:
    A, B = decomposition.components.A[name], decomposition.components.B[name]
    if units is None:
        return MatrixAmounts(name, None, column_squares(A, B).sum(1), None)
    squares = column_squares(A, B) if units.side == "out" else column_squares(B.mT, A.mT)
    numbers = unit_numbers(units, squares.shape[1]).to(squares.device)
    of_units = squares.new_zeros(len(squares), units.number + 1).index_add_(1, numbers, squares)
    return MatrixAmounts(name, units, squares.sum(1), of_units[:, : units.number])


def units_by_name(
    target: TargetModel, names: Sequence[str], units: Mapping[str, Units] | None
) -> dict[str, Units | None]:
    """For each of these matrices its heads or neurons, as the adapter or the user says.

    Raises as `weight_map` does.
    """
    known = {name: target.weights[name].units for name in names}
    for pattern, given in (units or {}).items():
        known |= {name: given for name in target.match(pattern) if name in known}
    for name, of_matrix in known.items():
        if of_matrix is None:
            continue
        matrix = target.weights[name]
        width = matrix.d_out if of_matrix.side == "out" else matrix.d_in - (matrix.bias is not None)
        if of_matrix.number < 1 or of_matrix.copies < 1 or width % (of_matrix.number * of_matrix.copies):
            raise InvalidSetting(
                f"{name} is {matrix.d_in} × {matrix.d_out} (d_in × d_out): its {of_matrix.side} side of {width} cannot "
                f"be cut into blocks of one width as {of_matrix} says."
            )
    return known


def unit_numbers(units: Units, width: int) -> Int[Tensor, " width"]:
    """The unit that each row or column of the side belongs to; `units.number` for the row of a bias."""
    per_block = width // (units.number * units.copies)
    numbers = torch.arange(units.number, device="cpu").repeat_interleave(per_block).repeat(units.copies)
    return torch.cat([numbers, torch.full((width - len(numbers),), units.number, device="cpu")])


def attribution_map(
    decomposition: Decomposition,
    batches: Iterable[Batch],
    metric: Metric | None = None,
    units: Mapping[str, Units] | None = None,
) -> ArchitectureMap:
    """Where each component has its effect on the output: its squared attribution by matrix, layer, head and neuron.

    a_l² is the squared gradient attribution through matrix l alone, as if the component had no part in the others,
    mean over data points; a_lu² that through the rows or columns of one unit. What is shared out is a_l², and within
    the matrix in proportion to a_lu². Parts that work together, or against each other, are each counted alone, so
    Σ_l a_l² is not A_c².

    Args:
        batches: what the model is called with, several times; gone through once, nothing is kept.
        metric: attribute to this scalar, output -> `batch` or (output, batch) -> `batch`, and not to the whole output.
        units: as in `weight_map`.

    Raises as `weight_map` does, and:
        NonFinite: a batch, or the output, holds NaN or infinity.
        InvalidBatches: no batches, or a tensor in the place of a list of them.
    """
    known = units_by_name(decomposition.target, decomposition.components.names, units)
    totals: dict[str, tuple[Tensor, Tensor | None]] = {}
    n_data = 0
    for batch in one_pass(batches):
        n_some, some = _squared_attributions(decomposition, batch, metric, known)
        n_data += n_some
        for name, (total, of_units) in some.items():
            if name in totals:
                before, units_before = totals[name]
                total = total + before
                of_units = None if of_units is None or units_before is None else of_units + units_before
            totals[name] = total, of_units
    matrices = []
    for name in decomposition.components.names:
        total, of_units = totals[name]
        total = total / n_data
        if of_units is not None:
            of_units = of_units * (total / of_units.sum(1).clamp_min(torch.finfo(total.dtype).tiny))[:, None]
            of_units = of_units[:, :-1]
        matrices.append(MatrixAmounts(name, known[name], total, of_units))
    return ArchitectureMap("attribution", tuple(matrices))


def metric_on(metric: Metric, batch: Batch) -> Callable[[Tensor], Tensor]:
    """The metric as a function of the output alone; one that takes two arguments is given the batch too."""
    parameters = inspect.signature(metric).parameters.values()
    needed = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty]
    return (lambda output: metric(output, batch)) if len(needed) > 1 else metric  # pyright: ignore[reportReturnType, reportCallIssue]


def as_text(table: pd.DataFrame) -> str:
    """All columns, numbers with four digits."""
    return table.to_string(float_format=lambda number: f"{number:.4g}")


@torch.inference_mode(False)
def _squared_attributions(
    decomposition: Decomposition,
    batch: Batch,
    metric: Metric | None,
    units: Mapping[str, Units | None],
) -> tuple[int, dict[str, tuple[Float[Tensor, " C"], Float[Tensor, "C units_and_rest"] | None]]]:
    """Number of data points; and for each matrix Σ a_l² over them, and Σ a_lu²."""
    settings = decomposition.settings
    attribution = (
        settings.attribution if isinstance(settings.attribution, GradientAttribution) else GradientAttribution()
    )
    granularity = settings.selection.granularity
    sums: dict[str, list[Tensor | None]] = {name: [None, None] for name in units}

    def add(watched: WatchedPass, name: str, index: int, squares: Tensor, scale: int) -> None:
        """Σ over data points of squares that were summed over outputs."""
        if metric is None:
            squares = mean_over_outputs(squares / scale, watched)
        summed = squares.flatten(0, -2).sum(0)
        before = sums[name][index]
        sums[name][index] = summed if before is None else before + summed

    with evaluating(decomposition.target.model):
        watched = decomposition._watch(batch)
        n_data = len(watched.output)
        if granularity == "position":
            n_data = int(watched.real.sum()) if watched.real is not None else watched.calls[0].y[..., 0].numel()
        if metric is None:
            cotangents = attribution.cotangents(watched.output, torch.Generator(watched.output.device).manual_seed(0))
            parts, scale = jacobians_in_parts(watched, cotangents, attribution.memory), cotangents.scale
        else:
            parts, scale = [(watched, iter([metric_gradients(watched, metric_on(metric, watched.run.batch))]))], 1
        with torch.no_grad():
            for part, chunks in parts:
                for jacobians in chunks:
                    gradients = jacobians.as_whole()
                    for name, of_matrix in units.items():
                        chosen = [(j, c) for j, c in zip(gradients, part.calls, strict=True) if c.use.matrix == name]
                        if all(jacobian is None for jacobian, _ in chosen):
                            continue
                        total, of_units = _squares(
                            chosen, decomposition.components, granularity, of_matrix, attribution.memory
                        )
                        add(part, name, 0, total, scale)
                        if of_units is not None:
                            add(part, name, 1, of_units, scale)
    like = next(decomposition.components.parameters())
    n_components = decomposition.components.n_components
    results: dict[str, tuple[Tensor, Tensor | None]] = {}
    for name, of_matrix in units.items():
        total, of_units = sums[name]
        total = like.new_zeros(n_components) if total is None else total
        if of_matrix is not None:
            shape = n_components, of_matrix.number + 1
            of_units = like.new_zeros(shape) if of_units is None else of_units.view(shape)
        results[name] = total, of_units
    return n_data, results


def _squares(
    chosen: Sequence[tuple[Tensor | None, Call]],
    components: ParameterComponents,
    granularity: Granularity,
    units: Units | None,
    memory: int,
) -> tuple[Float[Tensor, "examples *data_pos C"], Float[Tensor, "examples *data_pos C_and_units"] | None]:
    """Of the calls of one matrix: effects squared and summed over outputs; and those of each unit, `(C units)`."""
    jacobians, calls = Jacobians.whole([jacobian for jacobian, _ in chosen]), [call for _, call in chosen]
    effects = torch.cat(list(effects_of_calls(jacobians, calls, components, granularity, memory)), 1)
    squares = effects.square_().sum(0)
    if units is None:
        return squares, None
    of_units = []
    n_examples, (n_components, _, m) = len(calls[0].x), components.A[calls[0].use.matrix].shape
    positions = calls[0].y[0, ..., 0].numel()
    numbers = len(effects) * positions * n_components * (m + 2 * units.number)
    at_once = max(1, memory // (numbers * squares.element_size()))
    for first in range(0, n_examples, at_once):
        examples, total = slice(first, first + at_once), None
        for jacobian, call in chosen:
            if jacobian is not None:
                jacobian = jacobian if jacobian.shape[1] == 1 else jacobian[:, examples]
                effect = _effects_of_units(jacobian, call, components, granularity, units, examples, memory)
                total = effect if total is None else total + effect
        assert total is not None
        of_units.append(total.square_().sum(0).flatten(-2))
    return squares, torch.cat(of_units)


def _effects_of_units(
    jacobian: Float[Tensor, "v some *pos d_out"],
    call: Call,
    components: ParameterComponents,
    granularity: Granularity,
    units: Units,
    examples: slice,
    memory: int,
) -> Float[Tensor, "v examples *data_pos C units_and_rest"]:
    """<∂(v · f)/∂y , x P_c> through the rows or columns of each unit alone; last, through those of none (a bias)."""
    use, (A, B) = call.use, components.factors(call.use)
    x = call.x[examples] if call.x.is_floating_point() else F.one_hot(call.x[examples], A.shape[1])
    positions = x.shape[1:-1]
    x = x.to(A.dtype).reshape(len(x), -1, x.shape[-1])
    jacobian = jacobian.to(A.dtype).expand(-1, len(x), *jacobian.shape[2:])
    jacobian = jacobian.reshape(len(jacobian), *x.shape[:2], -1)
    on_columns = (units.side == "out") != use.transposed
    stored = components.B[use.matrix].shape[2] if units.side == "out" else components.A[use.matrix].shape[1]
    numbers = unit_numbers(units, stored)[use.columns if on_columns else use.rows]
    summed = "v e {} C" if granularity == "example" else "v e p {} C"
    whole = inner_activations(x, A) if on_columns else einsum(jacobian, B, "v e p d_out, C m d_out -> v e p C m")
    at_once = max(1, memory // (max(1, whole.numel()) * len(jacobian) * whole.element_size()))
    at_places = () if granularity == "example" else x.shape[1:2]
    effects = A.new_zeros(len(jacobian), len(x), *at_places, units.number + 1, len(A))
    for unit, index in _blocks(numbers.to(A.device), at_once):
        if on_columns:
            pulled = einsum(jacobian[..., index], B[..., index], "v e p u w, C m u w -> v e p u C m")
            some = einsum(pulled, whole, f"v e p u C m, e p C m -> {summed.format('u')}")
        else:
            inner = einsum(x[..., index], A[:, index], "e p u w, C u w m -> e p u C m")
            some = einsum(whole, inner, f"v e p C m, e p u C m -> {summed.format('u')}")
        effects[..., unit, :] = some
    return effects.mT.reshape(len(jacobian), len(x), *(positions if at_places else ()), len(A), units.number + 1)


def _blocks(
    numbers: Int[Tensor, " width"], at_once: int
) -> Iterator[tuple[Int[Tensor, " units"], Int[Tensor, "units w"]]]:
    """Units of one width, and which rows or columns belong to each; so many units at once."""
    present, counts = numbers.unique(return_counts=True)
    members = numbers.argsort(stable=True).split(counts.tolist())
    for width in counts.unique().tolist():
        same = torch.where(counts == width)[0]
        for some in same.split(at_once):
            yield present[some], torch.stack([members[unit] for unit in some.tolist()])
