"""The settings of a decomposition, kept together so that they can be saved with the result."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from apd_lens._checks import check_fields
from apd_lens._codec import saved
from apd_lens._errors import InvalidSetting
from apd_lens._schedules import HoldThenDecay, Schedule
from apd_lens.attribution._attribution import Attribution
from apd_lens.attribution._gradient import GradientAttribution
from apd_lens.losses._losses import Losses
from apd_lens.masks._masking import Masking, masking_of
from apd_lens.masks._selection import BatchTopK, Needed, Selection, TopK
from apd_lens.moves._cluster import ClusterMoves
from apd_lens.moves._moves import Moves
from apd_lens.passes._output import OutputFn
from apd_lens.passes._positions import last_position


@saved
@dataclass(frozen=True)
class Optimization:
    """Adam without weight decay.

    Attributes:
        steps: number of batches.
        lr: learning rate at the peak.
        scaled: the start, and lr, are in units of the factors that a matrix has: of the standard deviation that
            Xavier's start gives their entries, sqrt(2 / (d + m)), times the root of how much larger W is than one of
            Xavier's. So the larger a matrix, the smaller its steps; and a model whose layers are rescaled against each
            other is decomposed in the same way. False: lr is of all factors as it is, and the start is Xavier's.
        schedule: after the warm-up "cosine" is lr·cos(π/2 · progress), "linear" is lr·(1 − progress), "constant" is lr.
        warmup: share of the steps in which the learning rate rises linearly from 0.
        init_scale: standard deviation of the initial factors, in these units. At 1 the sum of many components is
            much larger than the weights. At 0.5 each component has a quarter of that size.
        start: "data" fits the factors to the first data in closed form: component 0 does what all data points have in
            common, each further one what a data point, or a group of them, does alone, and little on other data. The
            rest of the factors are tiny. See `apd_lens.start.fit_to_data`. "random" draws all factors. With "matrices"
            component 0 starts as the whole first matrix, component 1 as the second and so on, as far as their rank
            holds them, and each is nothing in the other matrices, which only moves can change; the rest are drawn. A
            matrix that serves every data point, such as a hidden identity, can then stay one component; one that does
            not is split by the moves. "auto" is "data" where that can be, and else "random": for one component, moves
            that have a start of their own, and data that can be gone through once only. The settings of the result say
            which it was.
        unit_norm: keep every column A_c[:, i] of the input sides at norm 1. What the gradient has along a column is
            taken out before Adam's step, and the column is brought back to norm 1 after it. At the start and after
            moves its norm goes to the row B_c[i, :], so that P_c stays. A column of zeros has no direction, and stays.
            Source: the paper's residual MLPs.
    """

    steps: int = 2_000
    lr: float = 3e-2
    scaled: bool = True
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.05
    init_scale: float = 0.5
    start: Literal["auto", "data", "random", "matrices"] = "auto"
    unit_norm: bool = False

    # Of decompositions of apd_lens 0.1.
    UNSAVED: ClassVar[dict[str, Any]] = {"scaled": False, "init_scale": 1.0, "start": "random"}

    def __post_init__(self) -> None:
        check_fields(self)
        if self.steps < 0:
            raise InvalidSetting(f"Optimization needs 0 steps or more, got {self.steps}.")
        if not 0 <= self.warmup < 1:
            raise InvalidSetting(f"warmup is a share of the steps, 0 <= warmup < 1, got {self.warmup}.")
        if self.init_scale <= 0:
            raise InvalidSetting(f"init_scale must be positive, got {self.init_scale}.")


@saved
@dataclass(frozen=True)
class Elsewhere:
    """What is asked of components on the `others`, data that they are not about.

    There the rest W − Σ P is on. Components that are not active must not matter, whatever part of them is on.

    Attributes:
        weight: coefficient of the distance of the output.
        selection: which components are active there all the same; None for none.
        attribution: by which; None for that of the data.
        simplicity: coefficient of the Schatten norms of components that are active there.
        output: what is compared there; None for the output of the data, at all positions.
    """

    weight: Schedule = 6.0
    selection: Selection | None = None
    attribution: Attribution | None = None
    simplicity: Schedule = 0.0
    output: OutputFn | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@saved
@dataclass(frozen=True)
class Settings:
    """All settings of `decompose`, apart from the model, the data and the output function.

    Attributes:
        elsewhere: of a targeted decomposition; None for one of all the weights.
        masks: who says what is active; None: the selection by the attribution. Given, it says these two as well.
    """

    selection: Selection = field(default_factory=lambda: BatchTopK(k=Needed(), least=0.15))
    attribution: Attribution = field(default_factory=GradientAttribution)
    losses: Losses = field(default_factory=Losses)
    optimization: Optimization = field(default_factory=Optimization)
    moves: Moves | None = field(default_factory=ClusterMoves)
    seed: int = 0
    masks: Masking | None = None
    elsewhere: Elsewhere | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.elsewhere is not None and self.losses.faithfulness:
            raise InvalidSetting(
                "Where there are others, components hold what the data use and the rest of the weights stays in the "
                f"rest, so that nothing asks them to sum to the weights. Give Losses(faithfulness=0, …); got "
                f"faithfulness={self.losses.faithfulness}."
            )
        if self.masks is not None:
            object.__setattr__(self, "selection", self.masks.selection)
            object.__setattr__(self, "attribution", self.masks.attribution)

    @property
    def masking(self) -> Masking:
        """Who says what is active."""
        return masking_of(self.selection, self.attribution) if self.masks is None else self.masks

    def after(self, minimality: Tensor, progress: float) -> "Settings":
        """The settings of the next step, in which another number of components may be active (`Needed`)."""
        masking = self.masking
        return self.with_masking(masking.after(minimality, progress, self.optimization.steps))

    def with_masking(self, masking: Masking) -> "Settings":
        """The same settings with a later form of their masking."""
        if masking == self.masking:
            return self
        return replace(self, selection=masking.selection) if self.masks is None else replace(self, masks=masking)


# What `decompose` does where nothing else is said, without and with others; and m at most.
DEFAULTS = Settings()
TARGETED = replace(DEFAULTS, losses=Losses(faithfulness=0.0), elsewhere=Elsewhere())
RANK = 4


def learning_rate(optimization: Optimization, step: int) -> float:
    """The learning rate of a step, counted from 0; beyond the last one, that of the last."""
    step = min(step, optimization.steps - 1)
    progress = step / optimization.steps
    if progress < optimization.warmup:
        return optimization.lr * (step + 1) / math.ceil(optimization.warmup * optimization.steps)
    after = (progress - optimization.warmup) / (1 - optimization.warmup)
    factor = {"cosine": math.cos(math.pi / 2 * after), "linear": 1 - after, "constant": 1.0}
    return optimization.lr * factor[optimization.schedule]


def paper() -> dict[str, Any]:
    """The settings of the paper's own form, as keyword arguments: `decompose(model, batches, …, **paper())`.

    A fixed number of active components, losses over the number of parameters, no path loss, no moves, full rank. The
    paper chooses k, coefficients and the learning rate for each system; these are those of its smallest.
    """
    return {
        "rank": None,
        "selection": BatchTopK(k=1.0),
        "losses": Losses(
            faithfulness=1.0, simplicity=0.7, schatten_p=1.0, simplicity_floor=0.0, path=0.0, normalization="paper"
        ),
        "moves": None,
        "optimization": Optimization(steps=20_000, lr=3e-2, scaled=False, init_scale=1.0, start="random"),
    }


def language_model(steps: int = 300, k: int = 2, projections: int = 8) -> dict[str, Any]:
    """Settings for a few tens or hundreds of prompts of a language model, beside general text, as keyword arguments:
    `decompose(model, prompts, others=texts, …, **language_model())`. They end in minutes on two cores.

    What the last position says is explained, in KL. Components are fitted to the prompts first. The projections that
    attributions are estimated from are fixed, so that each batch of a list is attributed by one pass.

    Args:
        steps: of training; 0 for the fitted start alone.
        k: number of components that are active on a prompt. Of the fitted ones one serves all prompts, and one each.
        projections: as of `GradientAttribution`.
    """
    return {
        "rank": 6,
        "selection": TopK(k),
        "attribution": GradientAttribution(projections=projections, fixed=True),
        "losses": Losses(faithfulness=0.0, distance="kl", simplicity=HoldThenDecay(0.002), simplicity_floor=0.0),
        # With more weight, or a higher learning rate, components lose what the start has on the prompts.
        "elsewhere": Elsewhere(weight=3.0),
        "moves": None,
        "optimization": Optimization(steps=steps, lr=3e-4, scaled=False, start="data"),
        "output": last_position(),
    }
