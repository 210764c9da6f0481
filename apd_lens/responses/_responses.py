"""What components respond to: the examples on which each matters most, what it does to the output there, and which
others it fires with.

In one pass over the data, for every component the examples with the largest attributions are kept, and how often it
was active together with every other one. Then the kept examples are run again without the component. Nothing that is
kept grows with the data.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from apd_lens._block import full_precision
from apd_lens._table import Tabled, frame
from apd_lens.data._batch import Batch
from apd_lens.data._inputs import Inputs

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, eq=False, repr=False)
class TopExamples(Tabled):
    """For every component, the n examples on which its attribution is largest, the largest first.

    Where data points are positions, the attribution of an example is that of its largest position. n is smaller than
    what was asked for where fewer examples were seen.

    Attributes:
        example: indices of the examples, counted from 0 through all batches.
        attribution: attribution of the component on each example, in units of the output.
        active: whether the component was active on each example, at some position.
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
        """Indices of the top examples of one component."""
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


@dataclass(frozen=True, eq=False, repr=False)
class ExampleEffects(Tabled):
    """What taking a component out changes on each of its top examples, at the position where it changes most.

    Attributes:
        distance: as of `Effects`; NaN where the example does not count.
        position: of the output, 0 where it has none.
        outputs: the output units that change most there, the most changed first.
        whole, without: their probabilities, if outputs are logits, else their values, with the component and without.
    """

    distance: Float[Tensor, "C n"]
    position: Int[Tensor, "C n"]
    outputs: Int[Tensor, "C n few"]
    whole: Float[Tensor, "C n few"]
    without: Float[Tensor, "C n few"]

    def table(self) -> "DataFrame":
        """One row for each component, top example and output unit; `rank` is that of the example."""
        component, rank, place = (~self.distance.isnan())[..., None].expand(self.outputs.shape).nonzero(as_tuple=True)
        return frame(
            {
                "component": component,
                "rank": rank,
                "position": self.position[component, rank],
                "output": self.outputs[component, rank, place],
                "whole": self.whole[component, rank, place],
                "without": self.without[component, rank, place],
                "distance": self.distance[component, rank],
            }
        )


@dataclass(frozen=True, eq=False, repr=False)
class Effects(Tabled):
    """What components add to the output: f(x, W) − f(x, W − P_c), with each component taken out of the whole model.

    Measured on the top examples on which a component was active, or on all its top examples if it was active on none.

    Attributes:
        promoted: the outputs that the component raises most, the largest first. Where outputs are logits, those whose
            probability rises most: a logit that rises may be that of an output which stays unlikely.
        promoted_by: mean by which it raises them: over the examples, and over the positions at which it was active
            where data points are positions and the output has the same, else over all positions.
        suppressed, suppressed_by: the same for the outputs that it lowers most; the numbers are negative, unless the
            probability of an output falls though its logit rises.
        promoted_p, suppressed_p: mean change of the probability of these outputs; None where outputs are no logits.
        change: root mean square over outputs (of all positions) of the effect, mean over the examples.
        distance: the decomposition's own distance between the output with and without the component ("mse", "kl" in
            nats, or the user's; "mse" where a loaded decomposition lacks it), mean over the examples.
        loss: by how much the given loss rises without the component, mean over the examples; None if no loss was given.
        n_examples: number of examples in these means.
        n_outputs: number of output units.
        centred: whether the mean over outputs was subtracted from each effect, since softmax does not see it.
        on_each: the same on every example alone.
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
    on_each: ExampleEffects
    promoted_p: Float[Tensor, "C n"] | None = None
    suppressed_p: Float[Tensor, "C n"] | None = None

    def table(self) -> "DataFrame":
        """One row for each component and output unit; `effect` is above 0 where the component raises the unit, and
        `probability`, of logits, is by how much that of the unit rises."""
        C, n = self.promoted.shape

        def both(promoted: Tensor, suppressed: Tensor) -> Tensor:
            return torch.cat([promoted, suppressed.flip(1)], 1).flatten()

        columns = {
            "component": torch.arange(C, device="cpu").repeat_interleave(2 * n),
            "output": both(self.promoted, self.suppressed),
            "effect": both(self.promoted_by, self.suppressed_by),
        }
        if self.promoted_p is not None and self.suppressed_p is not None:
            columns["probability"] = both(self.promoted_p, self.suppressed_p)
        return frame(columns)


@dataclass(frozen=True, eq=False, repr=False)
class CoActivation(Tabled):
    """Which components are active together.

    Attributes:
        counts: number of data points on which both are active; on the diagonal, on which one is.
        n_data_points: number of data points that were seen.
    """

    counts: Int[Tensor, "C C"]
    n_data_points: int

    @property
    def lift(self) -> Float[Tensor, "C C"]:
        """n_ij n / (n_i n_j): how often both are active, relative to independent components, for which it is 1. It is 0
        where one is never active."""
        alone = self.counts.diagonal().double()
        return (self.counts * self.n_data_points / (alone[:, None] * alone).clamp_min(1)).float()

    @property
    def jaccard(self) -> Float[Tensor, "C C"]:
        """n_ij / (n_i + n_j − n_ij): the share of data points with either active on which both are."""
        alone = self.counts.diagonal()
        return self.counts / (alone[:, None] + alone - self.counts).clamp_min(1)

    def strongest(self, n: int) -> Int[Tensor, "C n"]:
        """For each component, the n others with the largest Jaccard index; −1 where fewer are ever active with it."""
        jaccard = self.jaccard.fill_diagonal_(0)
        values, others = jaccard.sort(dim=1, descending=True, stable=True)
        return others[:, :n].masked_fill(values[:, :n] == 0, -1)

    def table(self) -> "DataFrame":
        """One row for each pair that is ever active together, the largest Jaccard index first."""
        first, second = self.counts.triu(1).nonzero(as_tuple=True)
        columns = {
            "component": first,
            "other": second,
            "together": self.counts[first, second],
            "lift": self.lift[first, second],
            "jaccard": self.jaccard[first, second],
        }
        return frame(columns).sort_values("jaccard", ascending=False, kind="stable", ignore_index=True)


@dataclass(frozen=True, eq=False, repr=False)
class Responses(Tabled):
    """What every component responds to. `table()` has one row for each component, and the parts have their own tables.

    Attributes:
        n_examples, n_data_points: numbers of examples and data points that were seen, without padding.
        attribution: mean attribution over data points.
        top: the examples on which each component matters most.
        effects: what each component does to the output on them.
        together: which components are active together.
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
        and the one that it suppresses most (of logits by probability), what its ablation changes, and the component
        that it fires with most (−1: with none)."""
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
        if effects.promoted_p is not None and effects.suppressed_p is not None:
            columns["promotes p"] = effects.promoted_p[:, 0]
            columns["suppresses p"] = effects.suppressed_p[:, 0]
        if effects.loss is not None:
            columns["loss"] = effects.loss
        return frame(columns)


@full_precision()
def add_coactivation(counts: Num[Tensor, "C C"], mask: Bool[Tensor, "data C"]) -> None:
    """counts += maskᵀ mask, over the components that are active at all; in place."""
    active = mask.any(0).nonzero()[:, 0]
    fired = mask[:, active].float()
    # Exact: a float32 counts to 2^24, and no batch is that large.
    together = (fired.mT @ fired).to(counts)
    active = active.to(counts.device)
    counts[active[:, None], active] += together
