"""The Lp form: no selection in the training, but a power of the attributions."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apd_lens._checks import check_fields
from apd_lens._codec import saved
from apd_lens._errors import InvalidSetting
from apd_lens._processes import gathered
from apd_lens._schedules import Ramp, value_at
from apd_lens.attribution._attribution import Attribution
from apd_lens.attribution._gradient import GradientAttribution
from apd_lens.components._components import ParameterComponents
from apd_lens.data._batch import Batch
from apd_lens.data._points import Granularity, Valid, without_padding, zero_at_padding
from apd_lens.host._matrix import Use
from apd_lens.losses._losses import Losses
from apd_lens.losses._weights import lp_of_squares
from apd_lens.masks._masking import Masks
from apd_lens.masks._selection import BatchTopK, K
from apd_lens.passes._watch import WatchedPass


@saved
@dataclass(frozen=True)
class Lp:
    """No selection in the training: minimality is the mean over data points of Σ_c A_c^p, and A_c^p has the place of
    the mask in simplicity.

    Gradients go through the attributions and there is no sparse pass. So `Losses` may not have path, hidden or a
    distance, which need one. With `Losses(normalization="relative")` attributions are in units of the standard
    deviation of the target's output.

    You say afterwards which components are active. `select(batch, k=...)` takes the largest attributions of the batch,
    as `BatchTopK` does. Or `threshold` says it once, for `StepInfo`, `ClusterMoves` and `summary` too.
    Source: Braun et al. 2025, arXiv 2501.14926, "Lp" form of minimality.

    Attributes:
        p: the power; below 1 it favours few components. A `Ramp` changes it during training.
        granularity: whether a data point is an "example" or a "position".
        threshold: a component is active where its attribution exceeds this, in units of the outputs.
        attribution: has gradients.
    """

    p: float | Ramp = 0.9
    granularity: Granularity = "example"
    threshold: float | None = None
    attribution: Attribution = field(default_factory=GradientAttribution)

    def __post_init__(self) -> None:
        check_fields(self)
        if min((self.p.start, self.p.end) if isinstance(self.p, Ramp) else (self.p,)) <= 0:
            raise InvalidSetting(f"Lp needs a positive p, got p={self.p}.")
        if self.threshold is not None and self.threshold < 0:
            raise InvalidSetting(
                f"Attributions are never negative, so threshold={self.threshold} selects all. Raise it."
            )

    def __call__(
        self, attributions: Float[Tensor, "batch *pos C"], valid: Valid = None
    ) -> Bool[Tensor, "batch *pos C"]:
        if self.threshold is None:
            raise InvalidSetting(
                f"{self} was trained without a mask, so which components are active is for you to say: give the mean "
                "number of them, as in decomposition.select(batch, k=1.5), or train with Lp(threshold=...)."
            )
        return zero_at_padding(attributions > self.threshold, valid)

    def at(self, progress: float, batch: Batch) -> "Lp":
        return replace(self, p=value_at(self.p, progress))

    def learned(self, components: ParameterComponents, uses: Sequence[Use], generator: torch.Generator | None) -> None:
        return None

    def after(self, minimality: Tensor, progress: float, steps: int) -> "Lp":
        return self

    def with_k(self, k: K) -> BatchTopK:
        return BatchTopK(k, self.granularity)

    def n_active(self, n_data_points: int) -> None:
        return None

    @property
    def selection(self) -> "Lp":
        return self

    @property
    def says_what_is_active(self) -> bool:
        return self.threshold is not None

    @property
    def needs_gradients(self) -> bool:
        return True

    @property
    def runs_sparse_passes(self) -> bool:
        return False

    def masks(
        self,
        watched: WatchedPass,
        components: ParameterComponents,
        progress: float,
        scale: Float[Tensor, ""] | float,
        generator: torch.Generator | None = None,
    ) -> Masks:
        assert isinstance(self.attribution, GradientAttribution)  # see `check`
        squares = self.attribution.squares(watched, components, self.granularity, generator)
        squares, valid = gathered(squares, watched.run.inputs.of_all.n_examples), watched.run.inputs.of_all.valid
        sparsity = lp_of_squares(squares / scale, value_at(self.p, progress))
        attributions = squares.detach().sqrt()
        return Masks(
            attributions=attributions,
            importance=sparsity,
            active=None if self.threshold is None else self(attributions, valid),
            minimality=without_padding(sparsity, valid).sum(-1).mean(),
        )

    def check(self, n_components: int, losses: Losses | None = None) -> None:
        if not isinstance(self.attribution, GradientAttribution):
            raise InvalidSetting(
                f"Lp needs attributions that it can take gradients of, GradientAttribution; got {self.attribution}."
            )
        passes = ("path", "completeness", "attack", "hidden")
        asked = (
            [] if losses is None else [f"{name}={getattr(losses, name)}" for name in passes if getattr(losses, name)]
        )
        if losses is not None and (asked or losses.distance != "mse"):
            raise InvalidSetting(
                "Lp has no mask and no sparse pass, so its losses are faithfulness, minimality and simplicity alone; "
                f"got Losses({', '.join([*asked, f'distance={losses.distance!r}'])}). Give Losses(path=0), or use "
                "BatchTopK or TopK."
            )
