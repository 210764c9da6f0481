"""Inputs of the matrices at the positions of the target data, with gradients there; second moments of other inputs."""

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apd_lens._block import no_grad
from apd_lens._errors import ApdWarning
from apd_lens._memory import BUDGET, fitting, slices
from apd_lens.attribution._over_outputs import shared_positions
from apd_lens.attribution._pullback import jacobians_in_parts
from apd_lens.components._factors import MatrixInput
from apd_lens.data._batch import Batch
from apd_lens.data._inputs import Inputs
from apd_lens.data._points import Granularity, padded
from apd_lens.host._matrix import Use
from apd_lens.host._target import TargetModel
from apd_lens.passes._cotangents import Cotangents
from apd_lens.passes._output import OutputFn
from apd_lens.passes._watch import (
    Call,
    Compares,
    Run,
    WatchedPass,
    check_finite_output,
    examples_at_once,
    replaced_pass,
    watched_pass,
)

# The name of a matrix, and whether it is multiplied from its other side.
Side = tuple[str, bool]

# Bytes of gradients, and rows of one matrix, with which nothing further is looked at.
_ENOUGH = 2**30
_ENOUGH_ROWS = 2**12


@dataclass(frozen=True, eq=False)
class Rows:
    """Inputs of one side of a matrix, one for each position of each data point.

    Attributes:
        x: `rows d`, or the number that is looked up.
        gradients: of K projections of the outputs with respect to y.
        points: the data point of each row, counted over all batches.
        places: equal for rows at the same position of data points of one shape.
    """

    x: Float[Tensor, "rows d"] | Int[Tensor, " rows"]
    gradients: Float[Tensor, "K rows d_out"]
    points: Int[Tensor, " rows"]
    places: Int[Tensor, " rows"]

    def with_random_gradients(self, seed: int) -> "Rows":
        """The same rows in front of K random outputs of y, with entries ±1, so that the size of y says what it does."""
        K, n, d_out = self.gradients.shape
        generator = torch.Generator(self.gradients.device).manual_seed(seed)
        drawn = torch.randint(2, (K, 1, d_out), generator=generator, device=self.gradients.device).mul_(2).sub_(1)
        return replace(self, gradients=drawn.to(self.gradients).expand(K, n, d_out))


@dataclass(frozen=True, eq=False)
class TargetRows:
    """What passes over the target data gave.

    Attributes:
        of_sides: rows of each side of a matrix that was used.
        shapes: of each data point. Examples with as many positions and the same padding are of one shape, and so are
            all positions.
        numbers: those of shapes and of places.
        places: for each side the number of each of its places, the smallest first.
    """

    of_sides: dict[Side, Rows]
    shapes: Int[Tensor, " points"]
    numbers: "_Numbers"
    places: dict[Side, Int[Tensor, " places"]]


@dataclass(frozen=True, eq=False)
class OtherInputs:
    """Of one side of a matrix, on other data.

    Attributes:
        moments: mean of xᵀ x over all positions, padding left out.
        sums: of x at each place of the target data, from examples of the same shape.
        counts: how many those are.
    """

    moments: Float[Tensor, "d d"]
    sums: Float[Tensor, "places d"]
    counts: Float[Tensor, " places"]


@dataclass(frozen=True, eq=False)
class _WholeCall:
    """A call with its whole matrix; where a host multiplies head by head, the heads stand side by side.

    Attributes:
        place: which call of the forward it is.
    """

    place: Hashable
    side: Side
    x: MatrixInput
    y: Float[Tensor, "examples *pos d"]
    gradient: Float[Tensor, "K examples *pos d_out"]


class _Numbers(dict[Hashable, int]):
    """Counts what it has not met before."""

    def __missing__(self, key: Hashable) -> int:
        self[key] = len(self)
        return self[key]


def rows_of(
    target: TargetModel,
    names: Sequence[str],
    batches: Iterable[Batch | Inputs],
    output: OutputFn,
    granularity: Granularity,
    K: int,
    seed: int,
    most: int,
    compares: Compares = "numbers",
    memory: int = BUDGET,
) -> TargetRows:
    """Inputs and gradients at every position of the first data points, padding left out.

    Args:
        K: number of random projections, with entries ±1. They are the same for all examples.
            Where the gradients of all are zero, random ones stand for them.
        most: number of data points. Fewer are looked at where their gradients take more than 1 GiB, or are at more than
            4096 positions, and where `memory` is limited.
        compares: "distributions" takes the outputs in the metric of their distribution.
    """
    found: dict[Side, list[Rows]] = {}
    shapes: list[Tensor] = []
    numbers, n_points, n_bytes, n_rows = _Numbers(), 0, 0, defaultdict[Side, int](int)

    def passes() -> Iterator[tuple[WatchedPass, list[list[Tensor | None]]]]:
        """Over some examples at a time, with the gradients of their calls in chunks of projections."""
        for batch in batches:
            inputs = target.read(batch)
            inputs = inputs.some(slice(0, most)) if granularity == "example" else inputs
            at_once = min(examples_at_once(target, names, inputs), max(1, _enough_rows() // inputs.n_positions))
            for examples in slices(inputs.n_examples, at_once):
                watched = watched_pass(target, names, inputs.some(examples), output, compares=compares)
                check_finite_output(watched.output, "before the first step", watched)
                watched = watched.in_fisher_metric() if compares == "distributions" else watched
                projections = _projections(watched.output, K, seed, granularity)
                for part, chunks in jacobians_in_parts(watched, projections, memory):
                    yield part, [jacobians.as_whole() for jacobians in chunks]

    for part, gradients in passes():
        of_points = _shapes(part, numbers, granularity)
        is_point = of_points >= 0
        points = n_points - 1 + is_point.flatten().cumsum(0).view_as(of_points)
        shapes.append(of_points[is_point])
        n_points += len(shapes[-1])
        for call in _whole_calls(target, part.calls, gradients, K):
            rows = _rows(call, part, points, of_points, numbers, most)
            found.setdefault(call.side, []).append(rows)
            n_bytes += rows.gradients.nbytes
            n_rows[call.side] += len(rows.places)
        if n_points >= most or n_bytes > fitting(1, _ENOUGH) or max(n_rows.values(), default=0) >= _enough_rows():
            break
    joined = {side: _joined(target, side, parts) for side, parts in found.items()}
    if not any(bool(rows.gradients.any()) for rows in joined.values()):
        warnings.warn(
            "On the data that the start is fitted to, the gradient of the output is zero at every decomposed matrix: a "
            "clamp or a softmax is at its end on all of them, or output= does not depend on the weights. The start "
            "goes by the size of what is written, and attributions by gradients say nothing there.",
            ApdWarning,
            stacklevel=2,
        )
        joined = {side: rows.with_random_gradients(seed) for side, rows in joined.items()}
    return TargetRows(
        joined,
        torch.cat(shapes)[:most],
        numbers,
        {side: torch.cat([part.places for part in parts]).unique() for side, parts in found.items()},
    )


def _enough_rows() -> int:
    """So many that what is compared of each pair fits into the memory."""
    return min(_ENOUGH_ROWS, math.isqrt(fitting(3 * 8)))


def _projections(
    output: Float[Tensor, "batch *pos n_outputs"], K: int, seed: int, granularity: Granularity
) -> Cotangents:
    """K random ±1 each, so that the gradients of data points can be compared.

    Where these are positions, those of all positions are the same; where they are examples, those of the last position
    are the same whatever the number of positions.
    """
    _, *positions, n_outputs = output.shape
    generator = torch.Generator(output.device).manual_seed(seed)
    drawn_for = [1] * len(positions) if granularity == "position" else positions
    shape = (*drawn_for, K, n_outputs)
    drawn = torch.randint(2, shape, generator=generator, device=output.device, dtype=torch.int8).mul_(2).sub_(1)
    of_each = drawn.flip(list(range(len(positions)))).movedim(-2, 0).expand(K, *output.shape[1:])
    return Cotangents(K, lambda first, last: of_each[first:last].to(output.dtype), scale=K, exact=False, lasting=False)


def _shapes(part: WatchedPass, numbers: _Numbers, granularity: Granularity) -> Int[Tensor, "examples data_pos"]:
    """The shape of every data point of a pass; -1 for a position that is padding."""
    device = part.output.device
    if granularity == "position":
        shared_positions(part.calls)
        return torch.where(_is_data(part.calls[0].y, part).to(device), numbers["positions"], -1)
    found = [numbers[key] for key in _shape_keys(part)]
    return torch.tensor(found, device=device)[:, None]


def _shape_keys(part: WatchedPass) -> list[Hashable]:
    """Equal for examples of one shape."""
    lengths = tuple(call.y.shape[1:-1] for call in part.calls)
    valid = [None] * len(part.output) if part.valid is None else [tuple(row) for row in part.valid.tolist()]
    return [(lengths, pattern) for pattern in valid]


def _whole_calls(
    target: TargetModel, calls: Sequence[Call], chunks: Sequence[Sequence[Tensor | None]], K: int
) -> list[_WholeCall]:
    """The calls of a pass with their gradients, which come in chunks of projections; zero where nothing depends on y.

    A matrix's heads are joined where x or y of each is a part of one site's; K of all chunks.
    """
    met: dict[str, int] = {}
    heads: dict[Hashable, list[tuple[Call, Tensor]]] = {}
    for number, call in enumerate(calls):
        time = met[repr(call.use)] = met.get(repr(call.use), -1) + 1
        of_chunks = [at_y for chunk in chunks if (at_y := chunk[number]) is not None]
        gradient = torch.cat(of_chunks) if of_chunks else call.y.detach().new_zeros(K, *call.y.shape)
        gradient = call.use.scale * gradient.expand(-1, *call.y.shape)
        heads.setdefault((call.use.matrix, call.use.site, time), []).append((call, gradient))
    joined = []
    for place, some in heads.items():
        call, gradient = some[0]
        matrix, use, x = target.weights[call.use.matrix], call.use, call.x
        if use.rows != slice(None):
            x = torch.cat([other.x for other, _ in some], -1)
        if use.columns != slice(None):
            gradient = gradient.new_zeros(*gradient.shape[:-1], matrix.d_in if use.transposed else matrix.d_out)
            for other, at_y in some:
                gradient[..., other.use.columns] = at_y
        joined.append(_WholeCall(place, (use.matrix, use.transposed), x, call.y, gradient))
    return joined


def _rows(
    call: _WholeCall,
    part: WatchedPass,
    points: Int[Tensor, "examples data_pos"],
    shapes: Int[Tensor, "examples data_pos"],
    numbers: _Numbers,
    most: int,
) -> Rows:
    """One row for every position of a call that is of one of the first data points and no padding."""
    gradient = call.gradient.flatten(2, -2) if call.y.ndim > 2 else call.gradient[:, :, None]
    _, examples, n_positions, _ = gradient.shape
    points, shapes = points.to(gradient.device), shapes.to(gradient.device)
    positions = torch.arange(n_positions, device=points.device)
    kinds, of_kinds = shapes.unique(return_inverse=True)
    starts = torch.tensor([numbers[call.place, shape] for shape in kinds.tolist()], device=points.device)
    within = positions if points.shape[1] == 1 else torch.zeros_like(positions)
    places = starts[of_kinds] * 2**32 + within
    kept = (points < most).expand(-1, n_positions) & _is_data(call.y, part)
    x = call.x.reshape(examples, n_positions, -1)
    return Rows(
        x[kept] if call.x.is_floating_point() else x[kept][:, 0],
        gradient[:, kept],
        points.expand(-1, n_positions)[kept],
        places[kept],
    )


def _is_data(y: Float[Tensor, "examples *pos d"], part: WatchedPass) -> Bool[Tensor, "examples positions"]:
    """False at padding; all positions of a call in one row."""
    valid = padded(y, part.valid)
    if valid is None:
        return torch.ones(len(y), y[0, ..., 0].numel(), dtype=torch.bool, device=y.device)
    return valid.reshape(*valid.shape, *[1] * (y.ndim - 3)).expand(y.shape[:-1]).flatten(1)


def _joined(target: TargetModel, side: Side, parts: Sequence[Rows]) -> Rows:
    """The rows of all calls. Where some are looked up and others multiplied, all are as if multiplied."""
    x = [part.x for part in parts]
    if len({part.is_floating_point() for part in x}) == 2:
        matrix = target.weights[side[0]]
        d = matrix.d_out if side[1] else matrix.d_in
        x = [part if part.is_floating_point() else F.one_hot(part, d).float() for part in x]
    return Rows(
        torch.cat(x),
        torch.cat([part.gradients for part in parts], 1),
        torch.cat([part.points for part in parts]),
        torch.cat([part.places for part in parts]).unique(return_inverse=True)[1],
    )


@no_grad()
def other_inputs(
    target: TargetModel,
    names: Sequence[str],
    batches: Iterable[Batch | Inputs],
    output: OutputFn,
    rows: TargetRows,
) -> dict[Side, OtherInputs]:
    """What inputs are on other data, for each side of a matrix that something is multiplied by.

    Args:
        rows: of the target data.
    """
    moments: dict[Side, Tensor] = {}
    numbers: dict[Side, float] = {}
    multiplied = {side: of.x for side, of in rows.of_sides.items() if of.x.is_floating_point()}
    sums = {side: x.new_zeros(len(rows.places[side]), x.shape[1]).double() for side, x in multiplied.items()}
    counts = {side: of.new_zeros(len(of)) for side, of in sums.items()}
    calls: list[Call] = []

    def watch(use: Use, x: MatrixInput, original: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        y = original()
        calls.append(Call(use, x.detach().clone(), x, y.detach()))
        if not x.is_floating_point():
            return y
        valid = padded(y, inputs.valid)
        of_x = (x if valid is None else x[valid]).flatten(0, -2).double()
        side, matrix = (use.matrix, use.transposed), target.weights[use.matrix]
        d = matrix.d_out if use.transposed else matrix.d_in
        if side not in moments:
            moments[side], numbers[side] = of_x.new_zeros(d, d), 0
        moments[side][use.rows, use.rows] += of_x.mT @ of_x
        numbers[side] += len(of_x) * of_x.shape[-1] / d
        return y

    for batch in batches:
        calls.clear()
        inputs = target.read(batch)
        picked, _ = replaced_pass(target, names, watch, inputs, output)
        run = Run(target, names, inputs, output, None)
        part = WatchedPass(picked, inputs.valid, list(calls), [], {}, run)
        for side, places, x in _at_known_places(target, part, rows):
            if side in sums:
                sums[side].index_add_(0, places, x.double())
                counts[side] += torch.bincount(places, minlength=len(counts[side]))
    return {
        side: OtherInputs(of / numbers[side], sums[side], counts[side]) for side, of in moments.items() if side in sums
    }


def _at_known_places(
    target: TargetModel, part: WatchedPass, rows: TargetRows
) -> Iterator[tuple[Side, Int[Tensor, " rows"], Float[Tensor, "rows d"]]]:
    """Inputs at places that the target data have too, from examples of one of their shapes."""
    device = part.output.device
    shapes = torch.tensor([rows.numbers.get(key, -1) for key in _shape_keys(part)], device=device)[:, None]
    if bool((shapes < 0).all()):
        return
    is_unknown = (shapes < 0).long()
    for call in _whole_calls(target, part.calls, [[None] * len(part.calls)], 0):
        places = rows.places.get(call.side)
        if places is None or not call.x.is_floating_point():
            continue
        found = _rows(call, part, is_unknown, shapes, rows.numbers, 1)
        at = torch.searchsorted(places, found.places).clamp_max(len(places) - 1)
        is_known = places[at] == found.places
        yield call.side, at[is_known], found.x[is_known]
