"""Are components active where the latents of a dictionary are? Both are counted on the same data points."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apd_lens._block import no_grad, no_inference_mode
from apd_lens._errors import InvalidBatches, InvalidSetting, ShapeMismatch
from apd_lens._table import Printed
from apd_lens.compare._dictionaries import Dictionary, Latents, moved
from apd_lens.compare._matching import Matching, matching, side_by_side, with_null
from apd_lens.data._batch import Batch
from apd_lens.data._points import Valid, padded
from apd_lens.data._stream import one_pass
from apd_lens.decomposition._decomposition import Decomposition
from apd_lens.host._sites import reading
from apd_lens.masks._selection import K

Measure = Literal["f1", "jaccard", "precision", "recall", "correlation"]
Pool = Literal["max", "mean", "last"]


@dataclass(frozen=True, eq=False)
class ActivationSums:
    """Sums over all data points seen so far, in float64.

    Attributes:
        n: number of data points.
        both: number of data points on which a component and a latent are both active.
        component_active, latent_active: number of data points on which each is active.
        product: Σ value of the component × value of the latent.
        component_sums, latent_sums: Σ value and Σ value² of each.
    """

    n: int
    both: Float[Tensor, "C latents"]
    component_active: Float[Tensor, " C"]
    latent_active: Float[Tensor, " latents"]
    product: Float[Tensor, "C latents"]
    component_sums: Float[Tensor, "2 C"]
    latent_sums: Float[Tensor, "2 latents"]

    def __add__(self, other: "ActivationSums") -> "ActivationSums":
        return ActivationSums(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True, eq=False, repr=False)
class ActivationMatch(Printed):
    """How often components and latents are active together, beside a null. `print` shows the means.

    A latent is read as a detector of a component. Precision is the share of the latent's data points on which the
    component is active. Recall is the share of the component's data points on which the latent is active. Both are 0
    where nothing is active.

    Attributes:
        precision, recall, f1, jaccard: for every component and latent, from 0 to 1.
        correlation: Pearson correlation of the component's value with the latent's.
        by: the measure by which they are matched.
        found: which component matches which latent.
        shuffled: the null, in which latents are those of other data points of the batch.
        component_active, latent_active: share of data points on which each is active.
        n: number of data points.
    """

    precision: Float[Tensor, "C latents"]
    recall: Float[Tensor, "C latents"]
    f1: Float[Tensor, "C latents"]
    jaccard: Float[Tensor, "C latents"]
    correlation: Float[Tensor, "C latents"]
    by: Measure
    found: Matching
    shuffled: Matching
    component_active: Float[Tensor, " C"]
    latent_active: Float[Tensor, " latents"]
    n: int

    def table(self, of: Literal["component", "latent"] = "component") -> pd.DataFrame:
        """One row for each component, or latent, that is ever active, with all measures of its best match."""
        frame = self.found.table(of).rename(columns={"similarity": self.by, "its similarity": f"its {self.by}"})
        pairs = ("component", "best latent") if of == "component" else ("best component", "latent")
        c, latent = (torch.from_numpy(frame[column].to_numpy(copy=True)) for column in pairs)
        shares = {"active": self.component_active[c] if of == "component" else self.latent_active[latent]}
        measures = {name: getattr(self, name)[c, latent] for name in _MEASURES if name != self.by}
        frame = frame.assign(**{name: values.numpy() for name, values in (shares | measures).items()})
        return frame if of == "latent" else with_null(frame, shuffled_data_points=self.shuffled)

    def _parts(self) -> list[str]:
        kinds = {"found": self.found, "shuffled data points": self.shuffled}
        return [f"{self.by} of activity, {self.n} data points", side_by_side(kinds)]


_MEASURES = ("f1", "jaccard", "precision", "recall", "correlation")


def activation_sums(
    component_active: Bool[Tensor, "data C"],
    component_value: Float[Tensor, "data C"],
    latent_active: Bool[Tensor, "data latents"],
    latent_value: Float[Tensor, "data latents"],
) -> ActivationSums:
    """Sums over some data points. Add those of several batches."""

    def powers(values: Float[Tensor, "data units"]) -> Float[Tensor, "2 units"]:
        return torch.stack([values.double().sum(0), values.double().square().sum(0)])

    return ActivationSums(
        n=len(component_active),
        both=(component_active.float().mT @ latent_active.float()).double(),
        component_active=component_active.double().sum(0),
        latent_active=latent_active.double().sum(0),
        product=component_value.double().mT @ latent_value.double(),
        component_sums=powers(component_value),
        latent_sums=powers(latent_value),
    )


def activation_measures(sums: ActivationSums) -> dict[str, Float[Tensor, "C latents"]]:
    """Precision, recall, F1 = 2 both / (component + latent), Jaccard = both / either, and Pearson's correlation.

    0 where nothing is active, or nothing varies.
    """
    component, latent = sums.component_active[:, None], sums.latent_active
    (x, xx), (y, yy) = sums.component_sums[:, :, None], sums.latent_sums
    covariance = sums.product - x * y / sums.n
    spread = ((xx - x.square() / sums.n).clamp_min(0) * (yy - y.square() / sums.n).clamp_min(0)).sqrt()
    # What rounding leaves of a value that does not vary is no variance.
    spread = spread.masked_fill(spread <= 1e-10 * (xx * yy).sqrt(), torch.inf)
    return {
        "precision": (sums.both / latent.clamp_min(1)).float(),
        "recall": (sums.both / component.clamp_min(1)).float(),
        "f1": (2 * sums.both / (component + latent).clamp_min(1)).float(),
        "jaccard": (sums.both / (component + latent - sums.both).clamp_min(1)).float(),
        "correlation": (covariance / spread).float(),
    }


@no_inference_mode()
@no_grad()
def activation_match(
    decomposition: Decomposition,
    batches: Iterable[Batch],
    dictionary: Dictionary,
    *,
    by: Measure = "f1",
    value: Literal["mask", "attribution"] = "attribution",
    k: K | None = None,
    pool: Pool = "max",
    least: float = 0.0,
    threshold: float = 0.7,
    seed: int = 0,
) -> ActivationMatch:
    """Precision, recall, F1, Jaccard and correlation between every component and latent, on the same data points.

    A component is active where the selection says so. A latent is active where its value, computed from the target's
    activations, is above `least`. Data points are those of the decomposition. Where they are examples, latents are
    pooled over the positions of an example first. Only sums over data points are kept, a few matrices `C latents`.
    Padding is left out.

    Where each unit is active on one or two data points only, latents of other data points match just as well, and the
    null shows it. Then check pairs that were found by direction: `direction_match(...).found.of_pairs(match.f1)`.

    Args:
        batches: any number of batches, iterated once. Each needs two data points for the null.
        by: the measure by which components and latents are matched.
        value: what is correlated with a latent's activation: the component's mask (as 0 and 1) or its attribution.
        k: of the selection, as in `decomposition.select`.
        pool: over positions: "max" (active anywhere), "mean", or "last", the last one that is no padding.
        threshold: similarity above which two count as a match, for the number of matches that each has.
        seed: seed of the null, in which no data point keeps its own latents.

    Raises:
        InvalidBatches: no batches, one with a single data point, or one tensor in the place of batches.
        ShapeMismatch: the dictionary's place has other positions than the decomposition's data points.
        InvalidSetting: no such measure or pool, or no such place in the model.
    """
    if by not in _MEASURES:
        raise InvalidSetting(f"Matches can be looked for by one of {', '.join(_MEASURES)}, got {by!r}.")
    dictionary = moved(dictionary, next(decomposition.components.parameters()).device)
    generator = torch.Generator().manual_seed(seed)
    sums: ActivationSums | None = None
    null: ActivationSums | None = None
    for batch in one_pass(batches):
        mask, attributions, latents = _data_points(decomposition, batch, dictionary, k, pool)
        if len(mask) < 2:
            raise InvalidBatches("A batch with one data point cannot be shuffled. Give larger batches.")
        values = mask.float() if value == "mask" else attributions.float()
        order = torch.randperm(len(latents), generator=generator, device="cpu").to(latents.device)
        others = torch.empty_like(latents)
        others[order] = latents[order.roll(1)]  # one cycle, so that none stays in its place
        some, some_null = (activation_sums(mask, values, each > least, each.float()) for each in (latents, others))
        sums, null = (some, some_null) if sums is None or null is None else (sums + some, null + some_null)
    assert sums is not None  # there was a batch
    assert null is not None
    alive, alive_latents = sums.component_active > 0, sums.latent_active > 0
    if not alive_latents.any():
        raise InvalidSetting(
            f"No latent of {dictionary} is above {least:g} on any of {sums.n} data points. Is it the right place, and "
            "are the activations scaled as in its training?"
        )
    found = {name: matrix.cpu() for name, matrix in activation_measures(sums).items()}
    shuffled = activation_measures(null)[by]
    return ActivationMatch(
        **found,
        by=by,
        found=matching(found[by], threshold, alive, alive_latents),
        shuffled=matching(shuffled, threshold, alive, alive_latents),
        component_active=(sums.component_active / sums.n).float().cpu(),
        latent_active=(sums.latent_active / sums.n).float().cpu(),
        n=sums.n,
    )


def _data_points(
    decomposition: Decomposition, batch: Batch, dictionary: Dictionary, k: K | None, pool: Pool
) -> tuple[Bool[Tensor, "data C"], Float[Tensor, "data C"], Float[Tensor, "data latents"]]:
    """Mask, attributions and latents of the data points of a batch that are no padding."""
    with reading(decomposition.target.model, [dictionary.site]) as activations:
        some = decomposition.observe(batch, k)
    latents = dictionary.encode(activations[dictionary.site])
    granularity = decomposition.settings.selection.granularity
    latents = of_data_points(latents, some.attributions, some.valid, granularity, pool)
    return some.data(some.mask), some.data(some.attributions), some.data(latents)


def of_data_points(
    latents: Latents,
    attributions: Float[Tensor, "batch *data_pos C"],
    valid: Valid,
    granularity: Literal["example", "position"],
    pool: Pool,
) -> Float[Tensor, "batch *data_pos latents"]:
    """Latents of the data points that the attributions are of."""
    if granularity == "example":
        latents = pooled(latents, valid, pool)
    if latents.shape[:-1] != attributions.shape[:-1]:
        raise ShapeMismatch(
            f"Data points are {tuple(attributions.shape[:-1])}, of granularity {granularity!r}, but the dictionary's "
            f"latents are {tuple(latents.shape)}. Choose a place whose activations have those positions."
        )
    return latents


def pooled(latents: Latents, valid: Valid, pool: Pool = "max") -> Float[Tensor, "batch latents"]:
    """Latents of an example: the largest or the mean over its positions, or those of the last one; without padding."""
    if pool not in ("max", "mean", "last"):
        raise InvalidSetting(f'pool is "max", "mean" or "last", got {pool!r}.')
    if latents.ndim == 2:
        return latents
    valid = padded(latents, valid)
    flat = latents.flatten(1, -2)
    if valid is None:
        return flat.amax(1) if pool == "max" else flat.mean(1) if pool == "mean" else flat[:, -1]
    if pool == "max":
        return flat.masked_fill(~valid[..., None], -torch.inf).amax(1)
    if pool == "mean":
        return (flat * valid[..., None]).sum(1) / valid.sum(1, keepdim=True).clamp_min(1)
    last = valid.shape[1] - 1 - valid.int().flip(1).argmax(1)
    return flat[torch.arange(len(flat), device=flat.device), last]
