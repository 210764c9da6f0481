"""How unusual an input is, by the components that it uses and by how well they explain its output.

    monitor = apd.monitor.fit(decomposition, reference_batches)
    scores = monitor.score(batch)  # .surprise and .residual, one of each a data point

A monitor answers two questions, by comparison with reference data. Which active component is rarest, by itself or
beside another active one? And how far is the output on the active components from the target's? Data points are those
of the decomposition's selection: examples, or positions.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apd_lens._block import full_precision, no_grad
from apd_lens._checks import checked
from apd_lens._codec import decode_settings, encode_settings
from apd_lens._errors import ArtifactError, InvalidBatches, NonFinite
from apd_lens._files import user_path
from apd_lens._memory import fitting
from apd_lens._table import Printed, frame
from apd_lens._table import table as text_table
from apd_lens.components._components import ParameterComponents
from apd_lens.data._batch import Batch
from apd_lens.data._points import Valid, mean_over_positions, one_row, zero_at_padding
from apd_lens.data._stream import one_pass
from apd_lens.decomposition._artifact import read_tensors, write_tensors
from apd_lens.decomposition._decomposition import Decomposition, output_with
from apd_lens.decomposition._observed import Observed
from apd_lens.losses._outputs import distance_of_each
from apd_lens.masks._lp import Lp
from apd_lens.masks._selection import BatchTopK, K, Selection, TopK, with_k
from apd_lens.passes._replace import Mixture
from apd_lens.responses._responses import add_coactivation

if TYPE_CHECKING:
    from pandas import DataFrame

_FORMAT = "apd_lens monitor 2"
# Data points that printed scores show.
_SHOWN = 16
_WITHOUT_DIGEST = "apd_lens monitor 1"


@dataclass(frozen=True, eq=False, repr=False)
class Scores(Printed):
    """How unusual each data point is, `batch`, or `batch pos` where data points are positions; 0 at padding.

    Attributes:
        surprise: −log of how often the rarest active component is active on the reference data, in nats; see `rarity`.
            Where no component is active, −log of how often none is.
        component: the rarest active component; −1 where none is active.
        given: the other active component beside which it is so rare; −1 where it is rare by itself.
        distance: distance between the sparse output and the target's, in the units of the decomposition's distance.
        residual: the logarithm of the distance, in standard deviations of the reference data, from their mean.
    """

    surprise: Float[Tensor, "batch *pos"]
    component: Int[Tensor, "batch *pos"]
    given: Int[Tensor, "batch *pos"]
    distance: Float[Tensor, "batch *pos"]
    residual: Float[Tensor, "batch *pos"]

    def table(self) -> "DataFrame":
        """One row for each data point; positions are counted through all position axes."""
        n = self.surprise[0].numel()
        places = torch.arange(self.surprise.numel(), device="cpu")
        columns = {"example": places // n, "position": places % n}
        columns |= {field.name: getattr(self, field.name).flatten() for field in fields(self)}
        return frame(columns)

    def _parts(self) -> list[str]:
        """The data points of the largest surprise, and how large it is usually."""
        surprise = self.surprise.flatten().cpu()
        places = surprise.argsort(descending=True, stable=True)[:_SHOWN].tolist()
        n_positions = self.surprise[0].numel() if self.surprise.ndim > 1 else 1
        header = ["example", "position", "surprise", "component", "beside", "distance", "residual"]
        columns = [values.flatten().cpu() for values in (self.component, self.given, self.distance, self.residual)]
        rows = []
        for place in places:
            component, given, distance, residual = (column[place].item() for column in columns)
            position = str(place % n_positions) if self.surprise.ndim > 1 else "-"
            numbers = ["-" if number < 0 else str(number) for number in (component, given)]
            example = str(place // n_positions)
            rows.append([example, position, f"{surprise[place]:.2f}", *numbers, f"{distance:.3g}", f"{residual:.2f}"])
        head = f"surprise of {len(surprise)} data points: median {surprise.median():.2f} nats. The largest:"
        return [head, text_table(header, rows)]


@dataclass(frozen=True, eq=False)
class Monitor:
    """What is usual on the reference data. `fit` makes one.

    Attributes:
        decomposition: the decomposition whose components are watched.
        selection: decides which components are active on a data point, independently of the rest of its batch.
        n_data_points: number of data points in the reference data.
        n_empty: number of these on which no component was active.
        coactivation: number of data points on which two components were active together; on the diagonal, on which one
            was.
        residual_floor, residual_mean, residual_std: the floor is a thousandth of the mean distance; mean and standard
            deviation are those of log(distance + floor). The standard deviation is 1 where all distances are equal.
    """

    decomposition: Decomposition
    selection: Selection
    n_data_points: int
    n_empty: int
    coactivation: Float[Tensor, "C C"]
    residual_floor: float
    residual_mean: float
    residual_std: float

    def score(self, batch: Batch) -> Scores:
        """How unusual the data points of a batch are. A data point's score does not depend on the rest of its batch.

        Raises:
            NonFinite: the batch, or the output, holds NaN or infinity.
            AlreadyActive: the model is edited, or inside a context.
        """
        some = self.decomposition.observe(batch)
        mask = self.selection(some.attributions, some.valid)
        distance = _distances(self.decomposition, some, mask)
        table = rarity(self.coactivation, self.n_data_points)
        empty = -math.log((self.n_empty + 0.5) / (self.n_data_points + 1))
        surprise, component, given = _rarest(table.to(mask.device), mask.flatten(0, -2), empty)
        residual = ((distance + self.residual_floor).log() - self.residual_mean) / self.residual_std
        surprise = surprise.to(residual.dtype).view_as(residual)
        return Scores(
            surprise=_without_padding(surprise, some.valid),
            component=component.view_as(residual),
            given=given.view_as(residual),
            distance=distance,
            residual=_without_padding(residual, some.valid),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, at once; the decomposition is saved on its own. See `apd_lens.monitor.load`.

        Raises:
            ArtifactError: the system cannot write, of which the message says why.
        """
        numbers = [self.n_data_points, self.n_empty, self.residual_floor, self.residual_mean, self.residual_std]
        write_tensors(
            user_path(path),
            {"together": self.coactivation.cpu(), "numbers": torch.tensor(numbers, dtype=torch.float64, device="cpu")},
            {
                "format": _FORMAT,
                "selection": json.dumps(encode_settings(self.selection)),
                "components": _digest(self.decomposition.components),
            },
        )

    def __repr__(self) -> str:
        often = self.coactivation.diagonal().sum().item() / self.n_data_points
        never = int((self.coactivation.diagonal() == 0).sum())
        return (
            f"Monitor of {len(self.coactivation)} components on {self.n_data_points} data points of reference: "
            f"{often:.3g} are active on a data point, {never} never are"
        )


@checked
def fit(decomposition: Decomposition, batches: Iterable[Batch], *, k: K | None = None) -> Monitor:
    """Learns what is usual, in one pass over reference data. Keeps one number for each data point.

    If the decomposition selects by batches (`BatchTopK`), the monitor selects by a threshold: the mean over batches of
    the smallest selected attribution, as Bussmann et al. 2024 do for SAEs ("BatchTopK Sparse Autoencoders"). Give large
    batches in random order, so that their thresholds are close.

    Args:
        k: overrides how many components are active, as in `decomposition.select`. If fewer mechanisms work on the
            reference data than in training, give a smaller k: components that are active by noise alone make everything
            look usual.

    Raises:
        InvalidBatches: no batches, or fewer than two data points.
        InvalidSetting: as `decomposition.select`.
        NonFinite: a batch, or the output, holds NaN or infinity.
    """
    n_components = decomposition.components.n_components
    coactivation = torch.zeros(n_components, n_components, dtype=torch.float64, device="cpu")
    n_data_points, n_empty, thresholds, distances = 0, 0, [], []
    selection = with_k(decomposition.settings.selection, k)
    for batch in one_pass(batches):
        some = decomposition.observe(batch, k)
        active = some.data(some.mask)
        n_data_points += len(active)
        n_empty += int((~active.any(1)).sum())
        add_coactivation(coactivation, active)
        if isinstance(selection, BatchTopK) and bool(active.any()):
            thresholds.append(some.attributions[some.mask].min().item())
        distances.append(one_row(_distances(decomposition, some, some.mask), some.valid).cpu())
    if n_data_points < 2:
        raise InvalidBatches(f"A monitor needs at least 2 data points of reference, got {n_data_points}.")
    if isinstance(selection, BatchTopK):
        # A little below, so that what is equal to it is active.
        threshold = sum(thresholds) / max(len(thresholds), 1) * (1 - 1e-6)
        selection = Lp(granularity=selection.granularity, threshold=threshold)
    distance = torch.cat(distances).double()
    floor = max(distance.mean().item() / 1000, torch.finfo(torch.float32).tiny)
    logarithms = (distance + floor).log()
    return Monitor(
        decomposition=decomposition,
        selection=selection,
        n_data_points=n_data_points,
        n_empty=n_empty,
        coactivation=coactivation,
        residual_floor=floor,
        residual_mean=logarithms.mean().item(),
        residual_std=logarithms.std().item() or 1.0,
    )


def load(path: str | os.PathLike[str], decomposition: Decomposition) -> Monitor:
    """Loads a saved monitor for the decomposition that it was fitted to.

    Raises:
        ArtifactError: no such file, not a monitor, damaged or changed, or one of other components.
    """
    path, n_components = user_path(path), decomposition.components.n_components
    try:
        tensors, about, unchanged = read_tensors(path, at_most=8 * n_components**2 + 100)
    except ArtifactError as error:
        raise ArtifactError(f"Expected a file that monitor.save(path) wrote at {path}: {error}") from error
    if about.get("format") not in (_FORMAT, _WITHOUT_DIGEST):
        raise ArtifactError(
            f"{path} is no monitor that this apd_lens can read: expected the format {_FORMAT!r}, got "
            f"{about.get('format')!r:.80}. Upgrade apd_lens if it is newer."
        )
    if about["format"] == _FORMAT and not unchanged:
        raise ArtifactError(
            f"{path} is damaged, or was changed after it was saved: its digest does not fit its content. Fit the "
            "monitor again, and save it."
        )
    if about.get("components") != _digest(decomposition.components):
        raise ArtifactError(f"The monitor in {path} was fitted to other components. Fit one to these.")
    try:
        return _monitor_of(decomposition, tensors, decode_settings(json.loads(about["selection"])))
    except (KeyError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} holds no monitor that works: {error}. Fit it again, and save it.") from error


def _monitor_of(decomposition: Decomposition, tensors: dict[str, Tensor], selection: object) -> Monitor:
    """A monitor of what a file holds.

    Raises:
        KeyError, ValueError: it holds something else.
    """
    n_components = decomposition.components.n_components
    coactivation, numbers = tensors["together"], tensors["numbers"]
    if coactivation.shape != (n_components, n_components) or numbers.shape != (5,):
        raise ArtifactError(f"the shapes are {tuple(coactivation.shape)} and {tuple(numbers.shape)}")
    for name, values in (("together", coactivation), ("numbers", numbers)):
        if values.dtype not in (torch.float32, torch.float64) or not bool(values.isfinite().all()):
            raise ArtifactError(f"{name}, of {values.dtype}, must be finite and of float32 or float64")
    n_data_points, n_empty, floor, mean, std = numbers.tolist()
    if (
        not 0 <= n_empty <= n_data_points
        or n_data_points < 2
        or floor <= 0
        or std <= 0
        or bool((coactivation < 0).any())
    ):
        raise ArtifactError(f"the numbers {numbers.tolist()} are not possible")
    if not isinstance(selection, TopK | Lp) or selection.granularity != decomposition.settings.selection.granularity:
        raise ArtifactError(f"the selection {selection!r:.80} is not that of a monitor of this decomposition")
    selection.check(n_components)
    if isinstance(selection, Lp) and selection.threshold is None:
        raise ArtifactError(f"{selection} has no threshold")
    return Monitor(decomposition, selection, int(n_data_points), int(n_empty), coactivation, floor, mean, std)


@checked
def rarity(coactivation: Float[Tensor, "C C"], n_data_points: int) -> Float[Tensor, "given C"]:
    """−log p(c | e) in nats: how rare it is that component c is active where e is. The last row has −log p(c).

    p(c) = (n_c + ½) / (n + 1) and p(c | e) = p(c) · (n_ce + 1) / (n_e p(c) + 1): by as much below p(c) as the pair was
    seen less often than by chance, one being added to both, so that a pair that chance itself would hardly have
    brought says nothing. The diagonal is −∞: no component is rare where it is.

    >>> coactivation = torch.tensor([[50.0, 0.0], [0.0, 25.0]])  # never both, on 99 data points
    >>> rarity(coactivation, 99).exp()
    tensor([[ 0.0000, 53.9216],
            [26.9802,  0.0000],
            [ 1.9802,  3.9216]])
    """
    n_active = coactivation.diagonal()
    p = (n_active + 0.5) / (n_data_points + 1)
    beside = p * (coactivation + 1) / (n_active[:, None] * p + 1)
    return torch.cat([-beside.log().fill_diagonal_(torch.inf), -p.log()[None]])


def _rarest(
    table: Float[Tensor, "given C"], mask: Bool[Tensor, "data C"], empty: float
) -> tuple[Float[Tensor, " data"], Int[Tensor, " data"], Int[Tensor, " data"]]:
    """The largest entry of the table for each set of active components, its column, and its row (−1 the last one)."""
    n_components = mask.shape[1]
    n_most = int(mask.sum(1).max()) if len(mask) else 0
    parts = []
    for some in mask.split(fitting(32 * (n_most + 1) ** 2)):
        # The active components of each data point, side by side, and behind them what is no component.
        on, component = some.to(torch.uint8).topk(n_most, dim=1)
        nothing = torch.full((len(some), 1), n_components, device=mask.device)
        given, given_on = torch.cat([component, nothing], 1), torch.cat([on, torch.ones_like(nothing)], 1)
        if n_most == 0:
            component, on = torch.zeros_like(nothing), torch.zeros_like(nothing)
        rare = table[given[:, :, None], component[:, None]]
        rare = rare.masked_fill((given_on[:, :, None] * on[:, None]) == 0, -torch.inf).flatten(1)
        best, at = rare.max(1)
        row, column = at // component.shape[1], at % component.shape[1]
        nobody = ~some.any(1)
        found = component.gather(1, column[:, None])[:, 0].masked_fill(nobody, -1)
        beside = given.gather(1, row[:, None])[:, 0]
        beside = beside.masked_fill(nobody | (beside == n_components), -1)
        parts.append((best.masked_fill(nobody, empty), found, beside))
    surprise, found, beside = (torch.cat(column) for column in zip(*parts, strict=True))
    return surprise, found, beside


@no_grad()
def _distances(
    decomposition: Decomposition, some: Observed, mask: Bool[Tensor, "batch *pos C"]
) -> Float[Tensor, "batch *pos"]:
    """Between the sparse output and the target's, for each data point of the mask."""
    sparse = output_with(decomposition, some.inputs, Mixture(decomposition.components, mask))
    dtype = torch.promote_types(sparse.dtype, torch.float32)
    distance = distance_of_each(some.output.to(dtype), sparse.to(dtype), decomposition.settings.losses.distance)
    if not bool(distance.isfinite().all()):
        raise NonFinite("monitor: the distance between the sparse output and the target's is NaN or infinite.")
    if distance.ndim > mask.ndim - 1:  # outputs at positions of examples that are one data point each
        return mean_over_positions(distance, some.valid)
    while distance.ndim < mask.ndim - 1:  # one output for all positions
        distance = distance[..., None]
    return distance.expand(mask.shape[:-1]).clone()


def _without_padding(values: Float[Tensor, "batch *pos"], valid: Valid) -> Float[Tensor, "batch *pos"]:
    return zero_at_padding(values[..., None], valid)[..., 0]


def _digest(components: ParameterComponents) -> str:
    digest = hashlib.sha256()
    for name in components.names:
        for factor in (components.A[name], components.B[name]):
            digest.update(f"{name} {tuple(factor.shape)} {factor.dtype} ".encode())
            digest.update(factor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Mahalanobis:
    """Mean and inverse covariance of activations; made by `mahalanobis`."""

    mean: Float[Tensor, " d"]
    precision: Float[Tensor, "d d"]

    @full_precision()
    def score(self, activations: Float[Tensor, "data d"]) -> Float[Tensor, " data"]:
        """(a − μ)ᵀ Σ⁻¹ (a − μ) of every row."""
        centred = activations.to(self.mean) - self.mean
        return ((centred @ self.precision) * centred).sum(1)


@checked
@full_precision()
def mahalanobis(activations: Iterable[Float[Tensor, "_ d"]], ridge: float = 1e-6) -> Mahalanobis:
    """The baseline without components: how far activations are from those on the reference data.

    Args:
        activations: batches of activations `data d`, from any layer you choose.
        ridge: added to the diagonal of the covariance, in units of the mean variance.

    Raises:
        InvalidBatches: no activations.

    Source: Lee et al. 2018, "A simple unified framework for detecting out-of-distribution samples", with one class.
    """
    n = 0
    total = squares = torch.zeros((), dtype=torch.float64, device="cpu")
    for some in one_pass(activations):
        rows = some.detach().double()
        n, total, squares = n + len(rows), total + rows.sum(0).cpu(), squares + (rows.mT @ rows).cpu()
    mean = total / n
    covariance = squares / n - mean[:, None] * mean
    variance = covariance.diagonal().mean().clamp_min(torch.finfo(covariance.dtype).tiny)
    covariance.diagonal().add_(ridge * variance)
    return Mahalanobis(mean, torch.linalg.inv(covariance))
