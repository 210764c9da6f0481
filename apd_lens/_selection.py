"""Selection: from attributions to the mask of active components."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apd_lens._attribution import Granularity
from apd_lens._checks import check_fields
from apd_lens._errors import InvalidSetting
from apd_lens._padding import Real, padded, zero_at_padding
from apd_lens._schedules import Ramp, value_at


@dataclass(frozen=True)
class BatchTopK:
    """The k·n largest of all n·C attributions of a batch of n data points (padding is none).

    Attributes:
        k: mean number of active components a data point; need not be whole. A `Ramp` changes it during the training;
            afterwards its end counts.
        granularity: whether a data point is an "example" or a "position".
    """

    k: float | Ramp
    granularity: Granularity = "example"

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(self, attributions: Float[Tensor, "batch *pos C"], real: Real = None) -> Bool[Tensor, "batch *pos C"]:
        return batch_topk_mask(attributions, value_at(self.k, 1.0), real)

    def at(self, progress: float) -> "BatchTopK":
        """The selection when `progress`, a share of the steps, is done."""
        return replace(self, k=value_at(self.k, progress))

    def n_active(self, n_data_points: int) -> int:
        """How many components are active on so many data points, all together."""
        return int(value_at(self.k, 1.0) * n_data_points)


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

    def at(self, progress: float) -> "TopK":
        """The selection when `progress`, a share of the steps, is done: this one."""
        return self

    def n_active(self, n_data_points: int) -> int:
        """How many components are active on so many data points, all together."""
        return self.k * n_data_points


Selection = BatchTopK | TopK


def batch_topk_mask(
    attributions: Float[Tensor, "batch *pos C"], k: float, real: Real = None
) -> Bool[Tensor, "batch *pos C"]:
    """True for the int(k·n) largest of all n·C attributions, n data points.

    Args:
        real: False at padding, where nothing is selected and which is not counted; only where data points are
            positions.

    Raises:
        InvalidSetting: k·n selects nothing, or more than there is.
    """
    if (real := padded(attributions, real)) is not None:
        mask = torch.zeros_like(attributions, dtype=torch.bool)
        mask[real] = batch_topk_mask(attributions[real], k)
        return mask
    n_components = attributions.shape[-1]
    n_data_points = attributions[..., 0].numel()
    n_active = int(k * n_data_points)
    if not 1 <= n_active <= attributions.numel():
        raise InvalidSetting(
            f"BatchTopK(k={k}) selects int(k·n) = {n_active} of the n·C = {n_data_points} · {n_components} = "
            f"{attributions.numel()} attributions of a batch; it must select at least 1 and at most all. "
            f"Choose k between {1 / n_data_points:.4g} and {n_components} for this batch."
        )
    flat = torch.zeros(attributions.numel(), dtype=torch.bool, device=attributions.device)
    flat[attributions.flatten().topk(n_active, sorted=False).indices] = True
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
