"""Selection: from attributions to the mask of active components."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apd_lens._attribution import Granularity
from apd_lens._batches import Batch
from apd_lens._checks import check_fields
from apd_lens._errors import InvalidSetting
from apd_lens._padding import Real, padded, zero_at_padding
from apd_lens._schedules import Ramp, value_at

# A mean number of active components, as it is or as a function of the batch.
K = float | Callable[[Batch], float]


@dataclass(frozen=True)
class BatchTopK:
    """The k·n largest of all n·C attributions of a batch of n data points (padding is none).

    Attributes:
        k: mean number of active components a data point; need not be whole. A `Ramp` changes it during the training;
            afterwards its end counts. A function batch -> k says it for every batch, which it is given as the model is
            called with it: the true number of active features, in the paper's implementation. It may be 0. Functions
            are not saved: of a loaded decomposition give it again, `select(batch, k=function)`.
        granularity: whether a data point is an "example" or a "position".
        share: below 1, k is the most that can be active: of those k·n only as many are as are needed for this share of
            the sum of all squared attributions. So the data say how many are active, once components differ in what
            they do; from random factors, which all do as much, k has to be small. A k above C is C then.
    """

    k: float | Ramp | Callable[[Batch], float]
    granularity: Granularity = "example"
    share: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.share <= 1:
            raise InvalidSetting(f"share is a share of all squared attributions, 0 < share <= 1, got {self.share}.")

    def __call__(self, attributions: Float[Tensor, "batch *pos C"], real: Real = None) -> Bool[Tensor, "batch *pos C"]:
        k = self._number()
        if k == 0:
            return torch.zeros_like(attributions, dtype=torch.bool)
        return batch_topk_mask(attributions, k, real, self.share)

    def at(self, progress: float, batch: Batch) -> "BatchTopK":
        """The selection of a batch when `progress`, a share of the steps, is done: k is a number.

        Raises:
            InvalidSetting: a function gives something else than a number from 0 on.
        """
        if isinstance(self.k, float | int | Ramp):
            return replace(self, k=value_at(self.k, progress))
        k = self.k(batch)
        number = k.item() if isinstance(k, Tensor) and k.numel() == 1 else k
        if not isinstance(number, float | int) or not 0 <= number < math.inf:
            raise InvalidSetting(
                "BatchTopK(k=...) was given a function, which must give the mean number of active components a data "
                f"point, a number from 0 on; for this batch it gave {k!r}."
            )
        return replace(self, k=float(number))

    def n_active(self, n_data_points: int) -> int | None:
        """How many components are active on so many data points, all together; None if only attributions say it."""
        return _whole(self._number(), n_data_points) if self.share == 1 else None

    def _number(self) -> float:
        if not isinstance(self.k, float | int | Ramp):
            raise InvalidSetting(f"{self} is a function of the batch; .at(1.0, batch) is the selection of one.")
        return value_at(self.k, 1.0)


@dataclass(frozen=True)
class TopK:
    """The k largest attributions of each data point (padding is none).

    Attributes:
        k: number of active components a data point.
        granularity: whether a data point is an "example" or a "position".
    """

    k: int
    granularity: Granularity = "example"

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(self, attributions: Float[Tensor, "batch *pos C"], real: Real = None) -> Bool[Tensor, "batch *pos C"]:
        return topk_mask(attributions, self.k, real)

    def at(self, progress: float, batch: Batch) -> "TopK":
        """The selection of a batch when `progress`, a share of the steps, is done: this one."""
        return self

    def n_active(self, n_data_points: int) -> int:
        """How many components are active on so many data points, all together."""
        return self.k * n_data_points


@dataclass(frozen=True)
class Lp:
    """No selection in the training: minimality is the mean over data points of Σ_c A_c^p, and A_c^p has the place of
    the mask in simplicity.

    Gradients go through the attributions, there is no sparse pass, and so `Losses` must ask for nothing that needs
    one: no path, hidden or distance. With `Losses(normalization="relative")` attributions are in units of the target
    output's standard deviation.

    What is active is up to whoever asks. Either `select(batch, k=...)` takes the batch's largest attributions, as
    `BatchTopK` does; or `threshold` says it once and for all, for `StepInfo`, `ClusterMoves` and `summary` too.
    Source: Braun et al. 2025, arXiv 2501.14926, "Lp" form of minimality.

    Attributes:
        p: the power; below 1 it presses towards few components. A `Ramp` changes it during the training.
        granularity: whether a data point is an "example" or a "position".
        threshold: a component is active where its attribution, in units of the outputs, is above this.
    """

    p: float | Ramp = 0.9
    granularity: Granularity = "example"
    threshold: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if min((self.p.start, self.p.end) if isinstance(self.p, Ramp) else (self.p,)) <= 0:
            raise InvalidSetting(f"Lp needs a positive p, got p={self.p}.")
        if self.threshold is not None and self.threshold < 0:
            raise InvalidSetting(
                f"Attributions are never negative, so threshold={self.threshold} selects all. Raise it."
            )

    def __call__(self, attributions: Float[Tensor, "batch *pos C"], real: Real = None) -> Bool[Tensor, "batch *pos C"]:
        if self.threshold is None:
            raise InvalidSetting(
                f"{self} was trained without a mask, so which components are active is for you to say: give the mean "
                "number of them, as in decomposition.select(batch, k=1.5), or train with Lp(threshold=...)."
            )
        return zero_at_padding(attributions > self.threshold, real)

    def at(self, progress: float, batch: Batch) -> "Lp":
        """The selection when `progress`, a share of the steps, is done: p is a number."""
        return replace(self, p=value_at(self.p, progress))


Selection = BatchTopK | TopK | Lp


def with_k(selection: Selection, k: K | None) -> Selection:
    """The selection with another k, if one is given, and no share; with a k, `Lp` becomes `BatchTopK`."""
    if k is None:
        return selection
    return replace(selection, k=k) if isinstance(selection, TopK) else BatchTopK(k, selection.granularity)


def _whole(k: float, n_data_points: int) -> int:
    """int(k·n), but the whole number where k is one divided by n."""
    return math.floor(k * n_data_points + 1e-6)


def batch_topk_mask(
    attributions: Float[Tensor, "batch *pos C"], k: float, real: Real = None, share: float = 1.0
) -> Bool[Tensor, "batch *pos C"]:
    """True for the int(k·n) largest of all n·C attributions, n data points.

    >>> batch_topk_mask(torch.tensor([[3.0, 1.0], [0.5, 2.0]]), k=1.5, share=0.9)
    tensor([[ True, False],
            [False,  True]])

    Args:
        share: below 1, for the fewest of these whose squares make up this share of the sum of all squares; k may then
            be larger than C.
        real: False at padding, where nothing is selected and which is not counted; only where data points are
            positions.

    Raises:
        InvalidSetting: k·n selects nothing, or more than there is.
    """
    if (real := padded(attributions, real)) is not None:
        mask = torch.zeros_like(attributions, dtype=torch.bool)
        mask[real] = batch_topk_mask(attributions[real], k, None, share)
        return mask
    n_components = attributions.shape[-1]
    n_data_points = attributions[..., 0].numel()
    n_active = _whole(k if share == 1 else min(k, n_components), n_data_points)
    if not 1 <= n_active <= attributions.numel():
        raise InvalidSetting(
            f"BatchTopK(k={k}) selects int(k·n) = {n_active} of the n·C = {n_data_points} · {n_components} = "
            f"{attributions.numel()} attributions of a batch; it must select at least 1 and at most all. "
            f"Choose k between {1 / n_data_points:.4g} and {n_components} for this batch."
        )
    flat = torch.zeros(attributions.numel(), dtype=torch.bool, device=attributions.device)
    largest, indices = attributions.flatten().topk(n_active, sorted=share < 1)
    if share < 1:
        squares = largest.double().square()
        flat[indices] = squares.cumsum(0) - squares <= share * attributions.double().square().sum()
    else:
        flat[indices] = True
    return flat.view_as(attributions)


def topk_mask(attributions: Float[Tensor, "batch *pos C"], k: int, real: Real = None) -> Bool[Tensor, "batch *pos C"]:
    """True for the k largest attributions of each data point.

    Args:
        real: False at padding, where nothing is selected; only where data points are positions.

    Raises:
        InvalidSetting: k is not between 1 and C.
    """
    n_components = attributions.shape[-1]
    if not 1 <= k <= n_components:
        raise InvalidSetting(f"TopK(k={k}) needs k between 1 and the number of components, {n_components}.")
    indices = attributions.topk(k, dim=-1, sorted=False).indices
    mask = torch.zeros_like(attributions, dtype=torch.bool).scatter_(-1, indices, True)
    return zero_at_padding(mask, real)


@dataclass(frozen=True)
class AttributionError:
    """How far attributions are off that are estimated from K projections.

    Attributes:
        relative: standard error of an attribution over the attribution, the median over active components.
        agreement: share of the active (data point, component) pairs that half of the projections select and the other
            half selects too. Chance is k / C.
    """

    relative: float
    agreement: float


def attribution_error(
    samples: Float[Tensor, "K batch *pos C"], selection: Selection, real: Real = None
) -> AttributionError:
    """The spread of the estimates that each of K projections gives alone, and whether two halves select the same.

    The standard error of A² is std(samples²) / √K; of A = √(A²) it is that over 2 A.
    """
    squares, K = samples.square(), len(samples)
    mean = squares.mean(0)
    relative = squares.std(0) / K**0.5 / (2 * mean.clamp_min(torch.finfo(mean.dtype).tiny))
    active = selection(mean.sqrt(), real)
    first, second = (selection(half.mean(0).sqrt(), real) for half in (squares[: K // 2], squares[K // 2 :]))
    return AttributionError(
        relative=relative[active].median().item(),
        agreement=((first & second).sum() / first.sum()).item(),
    )
