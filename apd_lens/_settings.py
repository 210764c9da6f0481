"""What a decomposition was asked for, in one place, so that it can be saved with the result."""

import math
from dataclasses import dataclass, field
from typing import Literal

from apd_lens._attribution import Attribution, GradientAttribution
from apd_lens._checks import check_fields
from apd_lens._cluster_moves import ClusterMoves
from apd_lens._division_moves import DivisionMoves
from apd_lens._errors import InvalidSetting
from apd_lens._losses import Losses
from apd_lens._moves import SplitMoves
from apd_lens._selection import BatchTopK, Selection

Moves = SplitMoves | ClusterMoves | DivisionMoves


@dataclass(frozen=True)
class Optimization:
    """Adam without weight decay.

    Attributes:
        steps: number of batches.
        lr: learning rate at the peak.
        schedule: after the warm-up "cosine" is lr·cos(π/2 · progress), "linear" is lr·(1 − progress), "constant" is lr.
        warmup: share of the steps in which the learning rate rises linearly from 0.
        init_scale: standard deviation of the factors at the start, over Xavier's. With many components their sum is
            much larger than the weights at 1; at 0.5 every component is a quarter of that.
        start: "random" draws all factors. With "matrices" component 0 starts as the whole first matrix, component 1 as
            the second and so on, as far as their rank holds them, and each is nothing in the other matrices, which
            only moves can change; the rest are drawn. A matrix that serves every data point, such as a hidden identity,
            can then stay one component, which is not found from random factors; one that does not is split by the
            moves.
        unit_norm: keep every column A_c[:, i] of the input sides at norm 1. What the gradient has along a column is
            taken out before Adam's step, and the column is brought back to norm 1 after it. At the start and after
            moves its norm goes to the row B_c[i, :], so that P_c stays. A column of zeros has no direction, and stays.
            Source: the paper's residual MLPs.
    """

    steps: int = 20_000
    lr: float = 3e-2
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.05
    init_scale: float = 1.0
    start: Literal["random", "matrices"] = "random"
    unit_norm: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.steps < 1:
            raise InvalidSetting(f"Optimization needs at least 1 step, got {self.steps}.")
        if not 0 <= self.warmup < 1:
            raise InvalidSetting(f"warmup is a share of the steps, 0 <= warmup < 1, got {self.warmup}.")
        if self.init_scale <= 0:
            raise InvalidSetting(f"init_scale must be positive, got {self.init_scale}.")


def learning_rate(optimization: Optimization, step: int) -> float:
    """The learning rate of a step, counted from 0; beyond the last one, that of the last."""
    step = min(step, optimization.steps - 1)
    progress = step / optimization.steps
    if progress < optimization.warmup:
        return optimization.lr * (step + 1) / math.ceil(optimization.warmup * optimization.steps)
    after = (progress - optimization.warmup) / (1 - optimization.warmup)
    factor = {"cosine": math.cos(math.pi / 2 * after), "linear": 1 - after, "constant": 1.0}
    return optimization.lr * factor[optimization.schedule]


@dataclass(frozen=True)
class Settings:
    """All that `decompose` was told, apart from the model, the data and the output function."""

    selection: Selection = field(default_factory=lambda: BatchTopK(k=1.0))
    attribution: Attribution = field(default_factory=GradientAttribution)
    losses: Losses = field(default_factory=Losses)
    optimization: Optimization = field(default_factory=Optimization)
    moves: Moves | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
