"""Selection: from attributions to the mask of active components."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apd_lens._checks import check_fields
from apd_lens._codec import saved
from apd_lens._errors import InvalidSetting
from apd_lens._schedules import Ramp, value_at
from apd_lens.data._batch import Batch
from apd_lens.data._points import Granularity, Valid, padded, zero_at_padding

# Where the largest squared attribution of a data point is this share of the mean, it counts half.
_SMALL = 0.01

# A mean number of active components, as it is or as a function of the batch.
K = float | Callable[[Batch], float]


@saved
@dataclass(frozen=True)
class Needed:
    """k that the training finds: it grows while the active components give the output back too badly, and shrinks
    while they do so well enough.

    Attributes:
        now: k of the next step; at the end, of the decomposition.
        lowest: k shrinks no further.
        minimality: the term of that name that is good enough. With relative losses and mean squared errors, the share
            of the output's variance that may be missing.
        growth: the factor by which k grows in a tenth of the steps. Larger, it grows beyond what is needed before
            components have taken shape.
        decline: the factor by which it shrinks.
        hold: share of the steps in which k stays, since nothing is given back well at the start.
        release: share of the steps after which k only grows, so that what does little is given back too.
    """

    now: float = 1.0
    lowest: float = 0.1
    minimality: float = 0.02
    growth: float = 1.3
    decline: float = 2.0
    hold: float = 0.1
    release: float = 0.8

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.lowest <= self.now or self.growth < 1 or self.decline < 1:
            raise InvalidSetting(f"Needed takes 0 < lowest <= now, and a growth and a decline from 1 on, got {self}.")

    def after(self, minimality: float, progress: float, steps: int) -> "Needed":
        """For the next step out of so many, when `progress`, a share of them, is done."""
        if progress < self.hold:
            return self
        grows = minimality > self.minimality or progress >= self.release
        factor = (self.growth if grows else 1 / self.decline) ** (10 / steps)
        return replace(self, now=max(self.lowest, self.now * factor))


@runtime_checkable
class Selection(Protocol):
    """From attributions to the mask of active components."""

    @property
    def granularity(self) -> Granularity:
        """Whether a data point is an "example" or a "position"."""
        ...

    def __call__(
        self, attributions: Float[Tensor, "batch *pos C"], valid: Valid = None
    ) -> Bool[Tensor, "batch *pos C"]:
        """True for the active components; none is active at padding, where `valid` is False."""
        ...

    def at(self, progress: float, batch: Batch) -> "Selection":
        """The selection of a batch when `progress`, a share of the steps, is done."""
        ...

    def with_k(self, k: K) -> "Selection":
        """The selection with another mean number of active components a data point."""
        ...

    def check(self, n_components: int) -> None:
        """Raises InvalidSetting where there are too few components."""
        ...

    def n_active(self, n_data_points: int) -> int | None:
        """How many components are active on so many data points, all together; None where only the mask says it."""
        ...

    def after(self, minimality: Tensor, progress: float, steps: int) -> "Selection":
        """The selection of the next step out of so many, when `progress`, a share of them, is done."""
        ...


@saved
@dataclass(frozen=True)
class BatchTopK:
    """Selects the k·n largest of all n·C attributions of a batch of n data points. Padding is not counted.

    Attributes:
        k: mean number of active components a data point; need not be whole. A `Ramp` changes it during the training;
            afterwards its end counts. `Needed` finds it. A function batch -> k says it for every batch, which it is
            given as the model is called with it: the true number of active features, in the paper's implementation. It
            may be 0. Functions are not saved: of a loaded decomposition give it again, `select(batch, k=function)`.
        granularity: whether a data point is an "example" or a "position".
        least: above 0, the data say how many are active, and k is only the most. Attributions are compared by what
            they are of the largest of their data point, and a component is active only if that is at least this (see
            `batch_topk_mask`). At the start all components do as much as each other, so k should be small then. A k
            above C is C.
    """

    k: float | Ramp | Needed | Callable[[Batch], float]
    granularity: Granularity = "example"
    least: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.least < 1:
            raise InvalidSetting(f"least is a share of the largest attribution, 0 <= least < 1, got {self.least}.")
        if isinstance(self.k, Needed) and not self.least:
            raise InvalidSetting("BatchTopK(k=Needed()) needs least > 0, since k may grow beyond what does anything.")

    def __call__(
        self, attributions: Float[Tensor, "batch *pos C"], valid: Valid = None
    ) -> Bool[Tensor, "batch *pos C"]:
        k = self._number()
        if k == 0:
            return torch.zeros_like(attributions, dtype=torch.bool)
        return batch_topk_mask(attributions, k, valid, self.least)

    def at(self, progress: float, batch: Batch) -> "BatchTopK":
        """The selection of a batch when `progress`, a share of the steps, is done: k is a number.

        Raises:
            InvalidSetting: a function gives something else than a number from 0 on.
        """
        if isinstance(self.k, float | int | Ramp | Needed):
            return replace(self, k=_k_at(self.k, progress))
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
        return None if self.least else _whole(self._number(), n_data_points)

    def with_k(self, k: K) -> "BatchTopK":
        """Then k alone says how many are active."""
        return BatchTopK(k, self.granularity)

    def check(self, n_components: int) -> None:
        if isinstance(self.k, float | int | Ramp):
            most = math.inf if self.least else n_components
            for k in (self.k.start, self.k.end) if isinstance(self.k, Ramp) else (self.k,):
                check_k(self, k, n_components, most)

    def _number(self) -> float:
        if not isinstance(self.k, float | int | Ramp | Needed):
            raise InvalidSetting(f"{self} is a function of the batch; .at(1.0, batch) is the selection of one.")
        return _k_at(self.k, 1.0)

    def after(self, minimality: Tensor, progress: float, steps: int) -> "BatchTopK":
        """For the next step: only `Needed` changes. It has to wait for the device."""
        return replace(self, k=self.k.after(minimality.item(), progress, steps)) if isinstance(self.k, Needed) else self


@saved
@dataclass(frozen=True)
class TopK:
    """Selects the k largest attributions of each data point. Padding is not counted.

    Attributes:
        k: number of active components on each data point.
        granularity: whether a data point is an "example" or a "position".
    """

    k: int
    granularity: Granularity = "example"

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(
        self, attributions: Float[Tensor, "batch *pos C"], valid: Valid = None
    ) -> Bool[Tensor, "batch *pos C"]:
        return topk_mask(attributions, self.k, valid)

    def at(self, progress: float, batch: Batch) -> "TopK":
        """The selection of a batch when `progress`, a share of the steps, is done: this one."""
        return self

    def after(self, minimality: Tensor, progress: float, steps: int) -> "TopK":
        """For the next step: this one."""
        return self

    def n_active(self, n_data_points: int) -> int:
        """How many components are active on so many data points, all together."""
        return self.k * n_data_points

    def with_k(self, k: K) -> "TopK":
        return replace(self, k=k)

    def check(self, n_components: int) -> None:
        check_k(self, self.k, n_components, n_components)


def _k_at(k: float | Ramp | Needed, progress: float) -> float:
    return k.now if isinstance(k, Needed) else value_at(k, progress)


def with_k(selection: Selection, k: K | None) -> Selection:
    """The selection with another k, if one is given."""
    return selection if k is None else selection.with_k(k)


def check_k(selection: Selection, k: float, n_components: int, most: float) -> None:
    """Raises InvalidSetting if k is no number of active components."""
    if n_components >= 1 and not 0 < k <= most:
        raise InvalidSetting(
            f"{selection} needs 0 < k <= n_components: at least one and at most all of the {n_components} components "
            "can be active."
        )


def _whole(k: float, n_data_points: int) -> int:
    """int(k·n), but the whole number where k is one divided by n."""
    return math.floor(k * n_data_points + 1e-6)


def batch_topk_mask(
    attributions: Float[Tensor, "batch *pos C"], k: float, valid: Valid = None, least: float = 0.0
) -> Bool[Tensor, "batch *pos C"]:
    """True for the int(k·n) largest of all n·C attributions, n data points.

    >>> batch_topk_mask(torch.tensor([[3.0, 1.0], [0.5, 2.0]]), k=1.5, least=0.4)
    tensor([[ True, False],
            [False,  True]])

    Args:
        least: above 0, the largest r_c = A_c / max_c A_c are taken instead, so that each data point counts as much as
            any other, and only where r_c is at least this. Data points on which nothing does much count less: r_c² is
            A_c² / (max_c A_c² + a hundredth of the mean of that maximum). k may then be larger than C, and of one
            below 1 / n the batch still has one that is active.
        valid: False at padding, where nothing is selected and which is not counted; only where data points are
            positions.

    Raises:
        InvalidSetting: k·n selects nothing, or more than there is.
    """
    if (valid := padded(attributions, valid)) is not None:
        mask = torch.zeros_like(attributions, dtype=torch.bool)
        mask[valid] = batch_topk_mask(attributions[valid], k, None, least)
        return mask
    n_components = attributions.shape[-1]
    n_data_points = attributions[..., 0].numel()
    n_active = max(1, _whole(min(k, n_components), n_data_points)) if least else _whole(k, n_data_points)
    if not 1 <= n_active <= attributions.numel():
        raise InvalidSetting(
            f"BatchTopK(k={k}) selects int(k·n) = {n_active} of the n·C = {n_data_points} · {n_components} = "
            f"{attributions.numel()} attributions of a batch; it must select at least 1 and at most all. "
            f"Choose k between {1 / n_data_points:.4g} and {n_components} for this batch."
        )
    flat = torch.zeros(attributions.numel(), dtype=torch.bool, device=attributions.device)
    compared = _of_the_largest(attributions) if least else attributions
    flat[compared.flatten().topk(n_active, sorted=False).indices] = True
    mask = flat.view_as(attributions)
    return mask & (compared >= least) if least else mask


def _of_the_largest(attributions: Float[Tensor, "batch *pos C"]) -> Float[Tensor, "batch *pos C"]:
    """A_c of each data point over the largest of them, and less where that is small beside other data points'."""
    squares = attributions.square()
    largest = squares.amax(-1, keepdim=True)
    return (squares / (largest + _SMALL * largest.mean()).clamp_min(torch.finfo(squares.dtype).tiny)).sqrt()


def topk_mask(attributions: Float[Tensor, "batch *pos C"], k: int, valid: Valid = None) -> Bool[Tensor, "batch *pos C"]:
    """True for the k largest attributions of each data point.

    Args:
        valid: False at padding, where nothing is selected; only where data points are positions.

    Raises:
        InvalidSetting: k is not between 1 and C.
    """
    n_components = attributions.shape[-1]
    if not 1 <= k <= n_components:
        raise InvalidSetting(f"TopK(k={k}) needs k between 1 and the number of components, {n_components}.")
    indices = attributions.topk(k, dim=-1, sorted=False).indices
    mask = torch.zeros_like(attributions, dtype=torch.bool).scatter_(-1, indices, True)
    return zero_at_padding(mask, valid)
