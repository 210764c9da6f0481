"""What components respond to: the examples on which each matters most, what it does to the output there, and which
others it fires with.

In one pass over the data, for every component the examples with the largest attributions are kept, and how often it
was active together with every other one. Then the kept examples are run again without the component. Nothing that is
kept grows with the data.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from apd_lens._artifact import UserFunction
from apd_lens._attribution import AblationAttribution
from apd_lens._batches import Batch, one_pass, same_but_for_examples
from apd_lens._components import ParameterComponents, full_precision
from apd_lens._decomposition import Decomposition
from apd_lens._errors import InvalidSetting, MissingExtra, ShapeMismatch
from apd_lens._inputs import Inputs, joined_inputs
from apd_lens._losses import Distance, distance_of_each
from apd_lens._padding import Real, mean_over_positions, padded, without_padding
from apd_lens._passes import WatchedPass, replaced_pass, subtract_weights, subtract_weights_of_each
from apd_lens._selection import K
from apd_lens._target import evaluating

if TYPE_CHECKING:
    from pandas import DataFrame

# A function of a batch, as the model was called with it, and the explained output: one scalar an example.
LossFn = Callable[[Batch, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Observed:
    """A batch, and what the target and the components make of it.

    Attributes:
        inputs: what the model was called with.
        output: that is explained, zero at padding.
        real: False at padding.
    """

    inputs: Inputs
    output: Float[Tensor, "batch *output_pos n_outputs"]
    attributions: Float[Tensor, "batch *pos C"]
    mask: Bool[Tensor, "batch *pos C"]
    real: Real

    @property
    def batch(self) -> Batch:
        """As the model was called with it."""
        return self.inputs.batch

    def data(self, values: Tensor) -> Tensor:
        """`batch *pos C` as `data C`, without padding."""
        return without_padding(values, self.real).flatten(0, -2)


def observe(decomposition: Decomposition, batches: Iterable[Batch], k: K | None = None) -> Iterator[Observed]:
    """Every batch once, with its attributions and its mask; `k` as in `Decomposition.select`."""
    for batch in one_pass(batches):
        yield observed(decomposition, batch, k)


@torch.inference_mode(False)
def observed(decomposition: Decomposition, batch: Batch | Inputs, k: K | None = None) -> Observed:
    """One batch, with its attributions and its mask."""
    selection, settings = decomposition._selection(batch, k), decomposition.settings
    with evaluating(decomposition.target.model):
        watched = decomposition._watch(batch)
        generator = torch.Generator(watched.output.device).manual_seed(0)
        granularity = settings.selection.granularity
        attributions = settings.attribution(watched, decomposition.components, granularity, generator)
    return Observed(
        inputs=watched.run.inputs,
        output=watched.output.detach(),
        attributions=attributions,
        mask=selection(attributions, watched.real),
        real=watched.real,
    )


@dataclass(frozen=True, eq=False)
class TopExamples:
    """For every component the n examples on which its attribution is largest, the largest first.

    Where data points are positions, the attribution of an example is that of its largest position. n is smaller than
    what was asked for where fewer examples were seen.

    Attributes:
        example: numbers of the examples, counted from 0 through all batches.
        attribution: of the component on them, in units of the output.
        active: whether the component was active on them, at some position.
        positions: attribution of every position (all position axes in one), NaN behind the end of shorter examples.
            Where data points are examples, of the same attribution with the sum over positions left out. None where
            the matrices are used without positions, on different ones, or attributions are by ablation.
        active_positions: at which positions the component was active; None where data points are examples.
        read: number of an example -> what the model is called with.
    """

    example: Int[Tensor, "C n"]
    attribution: Float[Tensor, "C n"]
    active: Bool[Tensor, "C n"]
    positions: Float[Tensor, "C n pos"] | None
    active_positions: Bool[Tensor, "C n pos"] | None
    read: Mapping[int, Inputs]

    @property
    def inputs(self) -> Mapping[int, Batch]:
        """Number of an example -> what the model is called with, a batch of this one example."""
        return {number: inputs.batch for number, inputs in self.read.items()}

    def of(self, component: int) -> list[int]:
        """The examples of one component."""
        return self.example[component].tolist()

    def table(self) -> "DataFrame":
        """One row for each component and example; `position` is that of the largest attribution."""
        C, n = self.example.shape
        columns = {
            "component": torch.arange(C, device="cpu").repeat_interleave(n),
            "rank": torch.arange(n, device="cpu").repeat(C),
            "example": self.example.flatten(),
            "attribution": self.attribution.flatten(),
            "active": self.active.flatten(),
        }
        if self.positions is not None:
            columns["position"] = self.positions.nan_to_num(-1).argmax(2).flatten()
        return frame(columns)


@dataclass(frozen=True, eq=False)
class Effects:
    """What components add to the output: f(x, W) − f(x, W − P_c), each component taken out of the whole model.

    On the top examples on which a component was active (on all its top examples, if it was on none of them).

    Attributes:
        promoted: the output units that the component raises most, the largest first.
        promoted_by: mean by which it raises them: over the examples, and over the positions at which it was active
            where data points are positions and the output has the same, else over all positions.
        suppressed, suppressed_by: the same of those that it lowers most; negative numbers.
        change: root mean square over outputs (of all positions) of the effect, mean over the examples.
        distance: the decomposition's own distance between the output with and without the component ("mse", "kl" in
            nats, or the user's; "mse" where a loaded decomposition lacks it), mean over the examples.
        loss: by how much the loss that was given rises without the component, mean over the examples; None without.
        n_examples: number of examples that these are means over.
        n_outputs: number of output units.
        centred: whether the mean over outputs was taken off each effect, as softmax does not see it.
    """

    promoted: Int[Tensor, "C n"]
    promoted_by: Float[Tensor, "C n"]
    suppressed: Int[Tensor, "C n"]
    suppressed_by: Float[Tensor, "C n"]
    change: Float[Tensor, " C"]
    distance: Float[Tensor, " C"]
    loss: Float[Tensor, " C"] | None
    n_examples: Int[Tensor, " C"]
    n_outputs: int
    centred: bool

    def table(self) -> "DataFrame":
        """One row for each component and output unit; `effect` is above 0 where the component raises the unit."""
        C, n = self.promoted.shape
        units = torch.cat([self.promoted, self.suppressed.flip(1)], 1)
        by = torch.cat([self.promoted_by, self.suppressed_by.flip(1)], 1)
        return frame(
            {
                "component": torch.arange(C, device="cpu").repeat_interleave(2 * n),
                "output": units.flatten(),
                "effect": by.flatten(),
            }
        )


@dataclass(frozen=True, eq=False)
class CoActivation:
    """Which components fire together.

    Attributes:
        counts: data points on which both are active; on the diagonal, on which the one is.
        n_data_points: that were seen.
    """

    counts: Int[Tensor, "C C"]
    n_data_points: int

    @property
    def lift(self) -> Float[Tensor, "C C"]:
        """n_ij n / (n_i n_j): how many times more often than if they fired independently, which is 1. 0 where one never
        fires."""
        alone = self.counts.diagonal().double()
        return (self.counts * self.n_data_points / (alone[:, None] * alone).clamp_min(1)).float()

    @property
    def jaccard(self) -> Float[Tensor, "C C"]:
        """n_ij / (n_i + n_j − n_ij): of the data points on which one of them fires, the share on which both do."""
        alone = self.counts.diagonal()
        return self.counts / (alone[:, None] + alone - self.counts).clamp_min(1)

    def strongest(self, n: int) -> Int[Tensor, "C n"]:
        """For each component the n others with the largest Jaccard; −1 where it ever fires with fewer."""
        jaccard = self.jaccard.fill_diagonal_(0)
        values, others = jaccard.sort(dim=1, descending=True, stable=True)
        return others[:, :n].masked_fill(values[:, :n] == 0, -1)

    def table(self) -> "DataFrame":
        """One row for each pair that ever fires together, the largest Jaccard first."""
        first, second = self.counts.triu(1).nonzero(as_tuple=True)
        columns = {
            "component": first,
            "other": second,
            "together": self.counts[first, second],
            "lift": self.lift[first, second],
            "jaccard": self.jaccard[first, second],
        }
        return frame(columns).sort_values("jaccard", ascending=False, kind="stable", ignore_index=True)


@dataclass(frozen=True, eq=False)
class Responses:
    """What every component responds to; `table()` has one row a component, the parts have tables of their own.

    Attributes:
        n_examples, n_data_points: that were seen, padding not counted.
        attribution: mean over data points.
        top: the examples on which each matters most.
        effects: what each does to the output there.
        together: which fire together.
    """

    n_examples: int
    n_data_points: int
    attribution: Float[Tensor, " C"]
    top: TopExamples
    effects: Effects
    together: CoActivation

    @property
    def active(self) -> Float[Tensor, " C"]:
        """Share of data points on which each was active."""
        return self.together.counts.diagonal() / self.n_data_points

    def table(self) -> "DataFrame":
        """One row a component: how often active, mean attribution, its first example, the output unit that it promotes
        and the one that it suppresses most, what its ablation changes, and the component that it fires with most (−1:
        with none)."""
        effects, others = self.effects, self.together.strongest(1)[:, 0]
        components = torch.arange(len(others), device="cpu")
        columns = {
            "component": components,
            "active": self.active,
            "attribution": self.attribution,
            "example": self.top.example[:, 0],
            "promotes": effects.promoted[:, 0],
            "promotes by": effects.promoted_by[:, 0],
            "suppresses": effects.suppressed[:, 0],
            "suppresses by": effects.suppressed_by[:, 0],
            "change": effects.change,
            "distance": effects.distance,
            "fires with": others,
            "jaccard": self.together.jaccard[components, others].masked_fill(others < 0, 0),
        }
        if effects.loss is not None:
            columns["loss"] = effects.loss
        return frame(columns)


def responses(
    decomposition: Decomposition,
    batches: Iterable[Batch],
    *,
    examples: int = 8,
    outputs: int = 8,
    k: K | None = None,
    centred: bool | None = None,
    loss: LossFn | None = None,
    memory: int = 2**28,
) -> Responses:
    """What every component responds to, in one pass over the data and one more over the examples that were kept.

    Args:
        batches: gone through once; as many as are to be seen.
        examples: n, how many examples are kept for each component.
        outputs: how many output units are named that it promotes, and as many that it suppresses.
        k: how many components are active, as in `Decomposition.select`.
        centred: whether outputs are logits, whose mean over units says nothing and is taken off every effect. None: if
            the decomposition's distance is "kl".
        loss: a function (batch, explained output) -> one scalar an example, whose change by ablation is wanted as well.
            The batch is what the model was called with (tokens, not texts, where a tokenizer is at work).
        memory: bytes that temporaries may take, about. Beside them C × C numbers are kept, and for every component the
            attributions of its examples' positions.

    Raises:
        InvalidBatches: not iterable, empty, or a bare tensor.
        InvalidSetting: fewer than one example or output.
        NonFinite: a batch, or the output, holds NaN or infinity.
    """
    return respond(
        decomposition,
        observe(decomposition, batches, k),
        examples=examples,
        outputs=outputs,
        centred=centred,
        loss=loss,
        memory=memory,
    )


def respond(
    decomposition: Decomposition,
    observations: Iterable[Observed],
    *,
    examples: int,
    outputs: int,
    centred: bool | None,
    loss: LossFn | None,
    memory: int,
) -> Responses:
    """`responses`, of batches that were observed already."""
    if examples < 1 or outputs < 1:
        raise InvalidSetting(f"Expected at least one example and one output, got examples={examples}, {outputs=}.")
    C = decomposition.components.n_components
    n_seen, n_data_points, top = 0, 0, None
    attribution = torch.zeros(C, dtype=torch.float64, device="cpu")
    counts = torch.zeros(C, C, dtype=torch.int64, device="cpu")
    for some in observations:
        data, mask = some.data(some.attributions), some.data(some.mask)
        attribution += data.sum(0, dtype=torch.float64).cpu()
        add_coactivation(counts, mask)
        new = _top_of_batch(some, n_seen, examples)
        top = new if top is None else _merged(top, new, examples)
        n_seen, n_data_points = n_seen + len(some.attributions), n_data_points + len(mask)
    assert top is not None  # there was a batch
    if top.positions is None:
        top = replace(top, positions=_attributions_of_positions(decomposition, top, memory))
    return Responses(
        n_examples=n_seen,
        n_data_points=n_data_points,
        attribution=(attribution / max(1, n_data_points)).float(),
        top=top,
        effects=ablation_effects(decomposition, top, outputs=outputs, centred=centred, loss=loss, memory=memory),
        together=CoActivation(counts, n_data_points),
    )


@full_precision()
def add_coactivation(counts: Num[Tensor, "C C"], mask: Bool[Tensor, "data C"]) -> None:
    """counts += maskᵀ mask, over the components that are active at all; in place."""
    active = mask.any(0).nonzero()[:, 0]
    fired = mask[:, active].float()
    # Exact: a float32 counts to 2^24, and no batch is that large.
    together = (fired.mT @ fired).to(counts)
    active = active.to(counts.device)
    counts[active[:, None], active] += together


def _top_of_batch(some: Observed, first: int, n: int) -> TopExamples:
    """Of one batch, whose first example has that number."""
    attributions, mask = some.attributions, some.mask
    by_position = attributions.ndim > 2
    largest = attributions.flatten(1, -2).amax(1) if by_position else attributions
    values, order = (found[:n].mT for found in largest.sort(dim=0, descending=True, stable=True))
    components = torch.arange(len(values), device=values.device)[:, None]
    kept = order.unique().tolist()
    read = {first + index: some.inputs.picked([index]) for index in kept}
    if by_position:
        positions = attributions.flatten(1, -2)[order, :, components].cpu()
        active_positions = mask.flatten(1, -2)[order, :, components].cpu()
        active = active_positions.any(2)
    else:
        positions, active_positions, active = None, None, mask[order, components].cpu()
    return TopExamples(order.cpu() + first, values.float().cpu(), active, positions, active_positions, read)


def _merged(top: TopExamples, new: TopExamples, n: int) -> TopExamples:
    """The n largest of both; of equal ones those that came first."""
    attribution = torch.cat([top.attribution, new.attribution], 1)
    attribution, order = (found[:, :n] for found in attribution.sort(dim=1, descending=True, stable=True))

    def pick(one: Tensor, other: Tensor) -> Tensor:
        return torch.cat([one, other], 1).gather(1, order)

    def pick_rows(one: Tensor | None, other: Tensor | None, filler: float) -> Tensor | None:
        if one is None or other is None:
            return None
        width = max(one.shape[2], other.shape[2])
        both = [F.pad(rows, (0, width - rows.shape[2]), value=filler) for rows in (one, other)]
        return torch.cat(both, 1).gather(1, order[:, :, None].expand(-1, -1, width))

    example = pick(top.example, new.example)
    read = {**top.read, **new.read}
    return TopExamples(
        example=example,
        attribution=attribution,
        active=pick(top.active, new.active),
        positions=pick_rows(top.positions, new.positions, float("nan")),
        active_positions=pick_rows(top.active_positions, new.active_positions, False),
        read={number: read[number] for number in example.unique().tolist()},
    )


@dataclass(frozen=True, eq=False)
class _Group:
    """Kept examples of one shape, as one batch.

    Attributes:
        place: number of an example -> where it is in the batch.
    """

    inputs: Inputs
    place: dict[int, int]

    def places(self, numbers: Tensor) -> Int[Tensor, "..."]:
        """Where the examples of these numbers are in the batch; −1 for those that are not."""
        found = [self.place.get(number, -1) for number in numbers.flatten().tolist()]
        return torch.tensor(found, dtype=torch.long, device="cpu").view(numbers.shape)


def _groups(top: TopExamples) -> list[_Group]:
    alike: dict[Any, list[int]] = {}
    for number, inputs in top.read.items():
        alike.setdefault(same_but_for_examples(inputs.batch, inputs.of_examples), []).append(number)
    return [
        _Group(joined_inputs([top.read[number] for number in numbers]), {number: i for i, number in enumerate(numbers)})
        for numbers in alike.values()
    ]


@torch.inference_mode(False)
def _attributions_of_positions(
    decomposition: Decomposition, top: TopExamples, memory: int
) -> Float[Tensor, "C n pos"] | None:
    """Attributions of every position of the kept examples, where these are the data points."""
    attribution, components = decomposition.settings.attribution, decomposition.components
    if isinstance(attribution, AblationAttribution):  # a forward pass for every component and position
        return None
    parts, width = [], 0
    with evaluating(decomposition.target.model):
        for group in _groups(top):
            one = decomposition._watch(group.inputs.some(slice(0, 1)))
            positions = {call.y.shape[1:-1] for call in one.calls}
            if len(positions) != 1 or not (n_positions := next(iter(positions)).numel()) or not len(*positions):
                return None
            places = group.places(top.example)
            at_once = max(1, memory // (8 * n_positions * components.n_components))
            for first in range(0, group.inputs.n_examples, at_once):
                watched = decomposition._watch(group.inputs.some(slice(first, first + at_once)))
                generator = torch.Generator(watched.output.device).manual_seed(0)
                found = attribution(watched, components, "position", generator).flatten(1, -2).cpu()
                component, rank = ((places >= first) & (places < first + len(found))).nonzero(as_tuple=True)
                parts.append((component, rank, found[places[component, rank] - first, :, component]))
            width = max(width, n_positions)
    by_position = torch.full((*top.example.shape, width), float("nan"), dtype=torch.float32, device="cpu")
    for component, rank, values in parts:
        by_position[component, rank, : values.shape[1]] = values
    return by_position


@torch.inference_mode(False)
def ablation_effects(
    decomposition: Decomposition,
    top: TopExamples,
    *,
    components: ParameterComponents | None = None,
    outputs: int = 8,
    centred: bool | None = None,
    loss: LossFn | None = None,
    memory: int = 2**28,
) -> Effects:
    """What each component adds to the output on its top examples, by taking it out of the whole model.

    Args:
        components: others to take out in their places on the same examples, such as `random_components` (the null).
        outputs, centred, loss, memory: as in `responses`.
    """
    components = decomposition.components if components is None else components
    distance = known_distance(decomposition)
    centred = distance == "kl" if centred is None else centred
    with torch.no_grad(), evaluating(decomposition.target.model):
        groups = _groups(top)
        # A component's examples count where it was active, or all if it was on none of them.
        counts = top.active | ~top.active.any(1, keepdim=True)
        ablations = [_Ablation.of(decomposition, components, group, distance, centred, loss) for group in groups]
        n_outputs, C = ablations[0].n_outputs, len(counts)
        n = min(outputs, n_outputs)
        block, parts = max(1, memory // (16 * n_outputs)), []
        for first in range(0, C, block):
            some, total = slice(first, min(first + block, C)), None
            for group, ablation in zip(groups, ablations, strict=True):
                sums = ablation.sums(top, group.places(top.example[some]), counts[some], first, memory)
                total = sums if total is None else tuple(a + b for a, b in zip(total, sums, strict=True))
            assert total is not None
            numbers, effect, weight = total
            effect = effect / weight.clamp_min(1)[:, None]
            up, down = effect.topk(n), effect.topk(n, largest=False)
            parts.append((up.indices, up.values, down.indices, down.values, numbers))
    promoted, promoted_by, suppressed, suppressed_by, numbers = (torch.cat(p).cpu() for p in zip(*parts, strict=True))
    n_counted = counts.sum(1)
    means = numbers / n_counted.clamp_min(1)[:, None]
    return Effects(
        promoted=promoted,
        promoted_by=promoted_by,
        suppressed=suppressed,
        suppressed_by=suppressed_by,
        change=means[:, 0],
        distance=means[:, 1],
        loss=None if loss is None else means[:, 2],
        n_examples=n_counted,
        n_outputs=n_outputs,
        centred=centred,
    )


def known_distance(decomposition: Decomposition) -> Distance:
    """The distance that the decomposition was made with; "mse" if that was a function, which is not saved."""
    distance = decomposition.settings.losses.distance
    return "mse" if isinstance(distance, UserFunction) else distance


@dataclass(frozen=True, eq=False)
class _Ablation:
    """Taking components out on the examples of one group, each on its own."""

    decomposition: Decomposition
    components: ParameterComponents
    group: _Group
    distance: Distance
    centred: bool
    loss: LossFn | None
    n_outputs: int
    bytes_each: int

    @staticmethod
    def of(
        decomposition: Decomposition,
        components: ParameterComponents,
        group: _Group,
        distance: Distance,
        centred: bool,
        loss: LossFn | None,
    ) -> "_Ablation":
        one: WatchedPass = decomposition._watch(group.inputs.some(slice(0, 1)))
        factors = sum(factor[0].numel() * factor.element_size() for factor in components.parameters())
        return _Ablation(
            decomposition=decomposition,
            components=components,
            group=group,
            distance=distance,
            centred=centred,
            loss=loss,
            n_outputs=one.output.shape[-1],
            bytes_each=2 * one.bytes_per_example() + factors,
        )

    def sums(
        self, top: TopExamples, places: Int[Tensor, "some n"], counts: Bool[Tensor, "some n"], first: int, memory: int
    ) -> tuple[Float[Tensor, "some 3"], Float[Tensor, "some n_outputs"], Float[Tensor, " some"]]:
        """For components from `first` on, sums over examples: of the three numbers, of the effects on outputs, and of
        what these are to be divided by."""
        component, rank = (counts & (places >= 0)).nonzero(as_tuple=True)
        device = next(self.components.parameters()).device
        numbers = torch.zeros(len(places), 3, device=device, dtype=torch.float32)
        effects, weights = (
            torch.zeros(len(places), self.n_outputs, device=device, dtype=torch.float32),
            numbers[:, 0].clone(),
        )
        at_once = max(1, memory // self.bytes_each)
        for c, r in zip(component.split(at_once), rank.split(at_once), strict=True):
            distinct, which = places[c, r].unique(return_inverse=True)
            inputs = self.group.inputs.picked(places[c, r].tolist())
            whole = self.output(self.group.inputs.picked(distinct.tolist()), [])[which.to(device)]
            without = self.output(inputs, (c + first).tolist())
            of_each = torch.stack(self.measured(inputs, whole, without), 1)
            change = (whole - without).flatten(1, -2) if whole.ndim > 2 else (whole - without)[:, None]
            if self.centred:
                change = change - change.mean(-1, keepdim=True)
            counted = self.counted(top, c + first, r, change, inputs.valid)
            c = c.to(device)
            numbers.index_add_(0, c, of_each.to(numbers))
            with full_precision():
                effects.index_add_(0, c, torch.einsum("ip,ipo->io", counted, change).to(effects))
            weights.index_add_(0, c, counted.sum(1).to(weights))
        return numbers, effects, weights

    def output(self, inputs: Inputs, chosen: list[int]) -> Float[Tensor, "pairs *pos n_outputs"]:
        """The explained output without the chosen component of each example; with none chosen, of the target."""
        components, output = self.components, self.decomposition.output
        assert output is not None  # `_watch` has said so
        of_pairs = components.picked(chosen)
        of_each = subtract_weights_of_each(of_pairs, slice(None), None, 1)
        replaced = of_each if chosen else subtract_weights(of_pairs, [])
        return replaced_pass(self.decomposition.target, components.names, replaced, inputs, output)[0].float()

    def measured(self, inputs: Inputs, whole: Tensor, without: Tensor) -> list[Float[Tensor, " pairs"]]:
        """Root mean square of the change, the distance and the rise of the loss, of each pair."""
        real = padded(whole, inputs.valid)
        change = whole - without
        if self.centred:
            change = change - change.mean(-1, keepdim=True)
        squares = mean_over_positions(change.square().mean(-1), real)
        distance = distances(whole, without, self.distance, real)
        rise = torch.zeros_like(distance)
        if self.loss is not None:
            rise = self.loss(inputs.batch, without) - self.loss(inputs.batch, whole)
            if rise.shape != distance.shape:
                raise ShapeMismatch(
                    f"Expected loss to give one scalar an example, shape ({len(distance)},), got {tuple(rise.shape)} "
                    f"from an output of shape {tuple(whole.shape)}."
                )
        return [squares.sqrt(), distance, rise]

    def counted(
        self, top: TopExamples, component: Tensor, rank: Tensor, change: Tensor, real: Real
    ) -> Float[Tensor, "pairs pos"]:
        """1 at the positions of the output over which effects are averaged: where the component was active."""
        n_positions, everywhere = change.shape[1], torch.ones_like(change[:, :, 0])
        if real is not None and real.shape[1] == n_positions:
            everywhere = real.to(change)
        if top.active_positions is not None and top.positions is not None:
            n_data = (~top.positions[component, rank].isnan()).sum(1)
            if bool((n_data == n_positions).all()):
                active = top.active_positions[component, rank, :n_positions].to(change)
                return torch.where(active.any(1, keepdim=True), active, everywhere)
        return everywhere


def distances(
    target_output: Float[Tensor, "batch *pos n_outputs"],
    output: Float[Tensor, "batch *pos n_outputs"],
    distance: Distance,
    real: Real,
) -> Float[Tensor, " batch"]:
    """D of each example, mean over its positions, those at padding not counted."""
    return mean_over_positions(distance_of_each(target_output, output, distance), real)


def frame(columns: Mapping[str, Tensor | Sequence[Any]]) -> "DataFrame":
    """A pandas table of columns of one length.

    Raises:
        MissingExtra: pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError:
        raise MissingExtra("Tables need pandas. Install it with pip install 'apd-lens[compare]'") from None
    return pd.DataFrame(
        {name: column.tolist() if isinstance(column, Tensor) else column for name, column in columns.items()}
    )
