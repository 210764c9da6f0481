"""The losses. Each is a pure function of one matrix or one pair of outputs; the caller sums and normalises.

Source of all formulas unless another is named: Braun et al. 2025, arXiv 2501.14926.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from apd_lens._checks import check_fields
from apd_lens._codec import saved
from apd_lens._errors import InvalidSetting
from apd_lens._schedules import HoldThenDecay, Schedule
from apd_lens.losses._outputs import Distance
from apd_lens.passes._watch import Compares


@saved
@dataclass(frozen=True)
class Losses:
    """The coefficients of the losses. Each is a number, a `HoldThenDecay` or a `Ramp`.

    Attributes:
        faithfulness: the components sum to the weights.
        minimality: the model gives the same output with the active components only.
        simplicity: the active components have small Schatten norms, so low rank.
        schatten_p: the power p of that norm. Below 1 it favours low rank more strongly.
        simplicity_floor: in simplicity every component counts as active more often than it is, by this share of the
            mean over components. So components that are never active shrink too.
        path: like minimality, but each inactive component stays on by a random amount between 0 and 1. So inactive
            components must not matter in any partial combination (the paper's appendix on "inactive").
        parts: what each inactive component is in the path loss. "uniform": on by an amount drawn from [0, 1].
            "matrices": the same in a random subset of the matrices of each example; the others are the model's own.
            "noise": random factors of Xavier's size stand in its place.
        completeness: the inactive components and the rest change nothing where the active ones are off, either: all of
            them, and a random part of them, give what no component gives. So a copy of an active mechanism belongs to
            its component.
        attack: like path, with the amounts where they do most harm: found by gradient ascent that goes on from step to
            step beside the training.
        sparsity: few components are needed, as the masking counts it; of `Gates` alone.
        hidden: like minimality, on the activations of `hidden_at`.
        hidden_at: names of submodules whose outputs are compared, such as "blocks.0.mlp.hook_post".
        distance: between outputs: "mse", "kl" (outputs are logits), or a function
            (target output, sparse output) -> one scalar a data point.
        normalization: "paper" divides faithfulness and simplicity by the number of decomposed parameters and leaves
            the distance as it is. "relative" makes every term a share: faithfulness of ‖W‖², simplicity of the target's
            own Σ of singular values to the p, each the mean over matrices, weighted with their numbers of entries, so
            that none is drowned by one whose entries are larger; mean squared errors of the variance of the target's
            values (KL is in nats as it is). Where such an error is above 1, worse than a constant, its gradient is that
            of its logarithm. Simplicity is also divided by the mean over components of how often one is active (not in
            the Lp form), k / C, so it is about 1 for components that are active equally often and as large together as
            the target. Coefficients then mean the same on models of any size and scale, and for any C and k.
    """

    faithfulness: Schedule = 10.0
    minimality: Schedule = 1.0
    simplicity: Schedule = field(default_factory=lambda: HoldThenDecay(0.08))
    schatten_p: float = 0.9
    simplicity_floor: float = 0.5
    path: Schedule = 2.0
    parts: Literal["uniform", "matrices", "noise"] = "uniform"
    completeness: Schedule = 0.0
    attack: Schedule = 0.0
    sparsity: Schedule = 0.1
    hidden: Schedule = 0.0
    hidden_at: tuple[str, ...] = ()
    distance: Distance = "mse"
    normalization: Literal["paper", "relative"] = "relative"

    UNSAVED: ClassVar[dict[str, float]] = {"simplicity_floor": 0.0}  # of decompositions of apd_lens 0.1

    def __post_init__(self) -> None:
        check_fields(self)
        if self.schatten_p <= 0:
            raise InvalidSetting(f"schatten_p must be positive, got {self.schatten_p}.")
        if bool(self.hidden) != bool(self.hidden_at):
            raise InvalidSetting(
                "hidden and hidden_at go together: a coefficient and the submodules whose outputs are compared; got "
                f"hidden={self.hidden}, hidden_at={self.hidden_at}."
            )

    @property
    def compares(self) -> Compares:
        """How outputs are compared."""
        return "distributions" if self.distance == "kl" else "numbers"
