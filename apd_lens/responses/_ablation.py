"""What ablating a component changes on its top examples."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apd_lens._block import full_precision, no_inference_mode
from apd_lens._codec import UserFunction
from apd_lens._errors import ShapeMismatch
from apd_lens._memory import BUDGET, chunks, fitting
from apd_lens.components._components import ParameterComponents
from apd_lens.data._batch import Batch
from apd_lens.data._inputs import Inputs
from apd_lens.data._points import Valid, mean_over_positions, padded
from apd_lens.decomposition._decomposition import Decomposition, output_with
from apd_lens.host._target import evaluating
from apd_lens.losses._outputs import Distance, distance_of_each
from apd_lens.passes._replace import Mixture, all_but_one
from apd_lens.passes._watch import WatchedPass
from apd_lens.responses._groups import _Group, component_groups
from apd_lens.responses._responses import Effects, ExampleEffects, TopExamples

# A function of a batch, as the model was called with it, and the explained output: one scalar an example.
LossFn = Callable[[Batch, Tensor], Tensor]


# Output units that are named for each example alone.
_FEW = 4


@no_inference_mode()
def ablation_effects(
    decomposition: Decomposition,
    top: TopExamples,
    *,
    components: ParameterComponents | None = None,
    outputs: int = 8,
    centred: bool | None = None,
    loss: LossFn | None = None,
    memory: int = BUDGET,
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
        groups = component_groups(top)
        # A component's examples count where it was active, or all if it was on none of them.
        counts = top.active | ~top.active.any(1, keepdim=True)
        ablations = [_Ablation.of(decomposition, components, group, distance, centred, loss) for group in groups]
        n_outputs, C = ablations[0].n_outputs, len(counts)
        n = min(outputs, n_outputs)
        on_each = _no_effects(top.example, min(_FEW, n_outputs))
        parts = []
        for some in chunks(C, (32 if centred else 16) * n_outputs, memory):
            first, total = some.start, None
            for group, ablation in zip(groups, ablations, strict=True):
                sums = ablation.sums(top, group.places(top.example[some]), counts[some], first, memory, on_each)
                total = sums if total is None else tuple(a + b for a, b in zip(total, sums, strict=True))
            assert total is not None
            numbers, effect, probability, weight = total
            effect, probability = (values / weight.clamp_min(1)[:, None] for values in (effect, probability))
            ranked = probability if centred else effect
            up, down = ranked.topk(n).indices, ranked.topk(n, largest=False).indices
            found = [values.gather(1, which) for which in (up, down) for values in (effect, ranked)]
            parts.append((up, down, *found, numbers))
    promoted, suppressed, promoted_by, promoted_p, suppressed_by, suppressed_p, numbers = (
        torch.cat(part).cpu() for part in zip(*parts, strict=True)
    )
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
        on_each=on_each,
        promoted_p=promoted_p if centred else None,
        suppressed_p=suppressed_p if centred else None,
    )


def _no_effects(example: Int[Tensor, "C n"], few: int) -> ExampleEffects:
    """To be filled in."""
    values = torch.full((*example.shape, few), math.nan, dtype=torch.float32, device="cpu")
    outputs = torch.zeros_like(values, dtype=torch.long)
    return ExampleEffects(values[..., 0].clone(), outputs[..., 0].clone(), outputs, values, values.clone())


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
        one: WatchedPass = decomposition.watch(group.inputs.some(slice(0, 1)))
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
        self,
        top: TopExamples,
        places: Int[Tensor, "some n"],
        counts: Bool[Tensor, "some n"],
        first: int,
        memory: int,
        on_each: ExampleEffects,
    ) -> tuple[
        Float[Tensor, "some 3"], Float[Tensor, "some n_outputs"], Float[Tensor, "some n_or_no"], Float[Tensor, " some"]
    ]:
        """For components from `first` on, sums over examples: of the three numbers, of the effects on outputs, of those
        on their probabilities where outputs are logits, and of what these are to be divided by. What each example
        shows alone is put into `on_each`."""
        component, rank = (counts & (places >= 0)).nonzero(as_tuple=True)
        device = next(self.components.parameters()).device
        numbers = torch.zeros(len(places), 3, device=device, dtype=torch.float32)
        effects, weights = numbers.new_zeros(len(places), self.n_outputs), numbers.new_zeros(len(places))
        probabilities = numbers.new_zeros(len(places), self.n_outputs if self.centred else 0)
        at_once = fitting(self.bytes_each, memory)
        for c, r in zip(component.split(at_once), rank.split(at_once), strict=True):
            distinct, which = places[c, r].unique(return_inverse=True)
            inputs = self.group.inputs.picked(places[c, r].tolist())
            whole = self.output(self.group.inputs.picked(distinct.tolist()), [])
            whole = whole[which.to(whole.device)]
            without = self.output(inputs, (c + first).tolist())
            of_each = torch.stack(self.measured(inputs, whole, without), 1)
            change = (whole - without).flatten(1, -2) if whole.ndim > 2 else (whole - without)[:, None]
            if self.centred:
                change = change - change.mean(-1, keepdim=True)
            counted = self.counted(top, c + first, r, change, inputs.valid)
            self.put(
                on_each, (c + first, r), of_each[:, 1], (counted * change.square().mean(-1)).argmax(1), whole, without
            )
            c = c.to(device)
            numbers.index_add_(0, c, of_each.to(numbers))
            with full_precision():
                effects.index_add_(0, c, torch.einsum("ip,ipo->io", counted, change).to(effects))
                if self.centred:
                    rises = (whole.softmax(-1) - without.softmax(-1)).reshape(change.shape)
                    probabilities.index_add_(0, c, torch.einsum("ip,ipo->io", counted, rises).to(effects))
            weights.index_add_(0, c, counted.sum(1).to(weights))
        return numbers, effects, probabilities, weights

    def put(
        self,
        on_each: ExampleEffects,
        which: tuple[Tensor, Tensor],
        distance: Float[Tensor, " pairs"],
        position: Int[Tensor, " pairs"],
        whole: Float[Tensor, "pairs *pos n_outputs"],
        without: Float[Tensor, "pairs *pos n_outputs"],
    ) -> None:
        """What each pair of component and rank changes at its position."""
        pairs = torch.arange(len(position), device=whole.device)
        there = [values.reshape(len(pairs), -1, self.n_outputs)[pairs, position] for values in (whole, without)]
        one, other = (values.softmax(-1) for values in there) if self.centred else there
        few = (one - other).abs().topk(on_each.outputs.shape[-1]).indices
        found = (distance, position, few, one.gather(1, few), other.gather(1, few))
        for name, values in zip(("distance", "position", "outputs", "whole", "without"), found, strict=True):
            getattr(on_each, name)[which] = values.to(getattr(on_each, name))

    def output(self, inputs: Inputs, chosen: list[int]) -> Float[Tensor, "pairs *pos n_outputs"]:
        """The explained output without the chosen component of each example; with none chosen, of the target."""
        on = all_but_one(len(chosen), 1, next(self.components.parameters()).device)
        replaced = Mixture(self.components.picked(chosen), on, rest=1.0)
        return output_with(self.decomposition, inputs, replaced).float()

    def measured(self, inputs: Inputs, whole: Tensor, without: Tensor) -> list[Float[Tensor, " pairs"]]:
        """Root mean square of the change, the distance and the rise of the loss, of each pair."""
        valid = padded(whole, inputs.valid)
        change = whole - without
        if self.centred:
            change = change - change.mean(-1, keepdim=True)
        squares = mean_over_positions(change.square().mean(-1), valid)
        distance = distances(whole, without, self.distance, valid)
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
        self, top: TopExamples, component: Tensor, rank: Tensor, change: Tensor, valid: Valid
    ) -> Float[Tensor, "pairs output_pos"]:
        """1 at the positions of the output over which effects are averaged: where the component was active."""
        n_positions, everywhere = change.shape[1], torch.ones_like(change[:, :, 0])
        if valid is not None and valid.shape[1] == n_positions:
            everywhere = valid.to(change)
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
    valid: Valid,
) -> Float[Tensor, " batch"]:
    """D of each example, mean over its positions, those at padding not counted."""
    return mean_over_positions(distance_of_each(target_output, output, distance), valid)
