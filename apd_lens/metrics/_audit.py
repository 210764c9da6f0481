"""What "inactive" is worth: the model under maskings that change nothing if inactive components are inactive."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from apd_lens._block import no_inference_mode
from apd_lens._checks import checked
from apd_lens._draws import draws
from apd_lens._errors import InvalidSetting, ShapeMismatch
from apd_lens._table import Printed, frame, table
from apd_lens.components._components import ParameterComponents
from apd_lens.components._measures import random_components
from apd_lens.data._batch import Batch
from apd_lens.data._inputs import Inputs
from apd_lens.data._points import Valid, one_row, padded, without_padding
from apd_lens.data._stream import one_pass
from apd_lens.decomposition._decomposition import Decomposition, ready
from apd_lens.host._adapter import Intercept
from apd_lens.host._target import evaluating
from apd_lens.losses._outputs import distance_of_each
from apd_lens.masks._adversary import ascend, harder, with_gradient
from apd_lens.masks._sampling import random_subsets, usage_matched
from apd_lens.passes._replace import Mixture, added, by_matrix
from apd_lens.passes._watch import as_it_is, check_finite_output, replaced_pass

if TYPE_CHECKING:
    from pandas import DataFrame

# Where the rows of the attack are found among the others.
WORST_OF_EACH, WORST_FOR_ALL = "worst found for each data point, steps", "worst found for all, steps"


@dataclass(frozen=True, eq=False, repr=False)
class Audit(Printed):
    """The loss of the model under maskings, each beside its null controls. `audit` makes it, and says what rows are.

    A loss is the mean over data points of the decomposition's own distance (KL in nats, or the mean squared error) from
    the target's output. The target's own is 0. It is infinite where the changed model gives NaN.

    Attributes:
        what: name of each row.
        amount: a number that belongs to the row, such as the steps of an attack; None where there is none.
        loss: of each row.
        null: with the active components of another data point in the place of each one's own; NaN where that says
            nothing.
        random: with random components of the same spectra in the place of these; NaN where that says nothing.
        n_data_points, n_components: how many there are.
        n_active: mean number of active components of a data point.
        n_never_active: number of components that are active on no data point.
        rest: ‖W − Σ P‖ / ‖W‖, over all decomposed matrices.
        never_active: ‖Σ P‖ / ‖W‖ of those that are never active.
        matched: share of the active components of data points that another one is as often active as.
    """

    what: list[str]
    amount: list[int | None]
    loss: Float[Tensor, " rows"]
    null: Float[Tensor, " rows"]
    random: Float[Tensor, " rows"]
    n_data_points: int
    n_components: int
    n_active: float
    n_never_active: int
    rest: float
    never_active: float
    matched: float

    def ladder(self, what: str) -> tuple[list[int], Float[Tensor, " rungs"], float]:
        """Numbers, losses, and the null of the first, of rows with this name."""
        rows = [row for row, name in enumerate(self.what) if name == what]
        return [self.amount[row] or 0 for row in rows], self.loss[rows], self.null[rows[0]].item()

    def table(self) -> "DataFrame":
        """One row for each masking; n is −1 where no number belongs to it."""
        numbers = [-1 if n is None else n for n in self.amount]
        columns = {"what": self.what, "n": numbers, "loss": self.loss, "null": self.null, "random": self.random}
        return frame(columns)

    def metrics(self) -> dict[str, float]:
        """Losses by name, with their nulls, for `apd_lens.decomposition.Card(metrics=…)`. NaN is left out."""
        names = [what if n is None else f"{what}, {n}" for what, n in zip(self.what, self.amount, strict=True)]
        of_null = [f"{name}: null" for name in names]
        values = [*self.loss.tolist(), *self.null.tolist()]
        return {name: value for name, value in zip([*names, *of_null], values, strict=True) if value == value}

    def _parts(self) -> list[str]:
        cells = [
            ["" if x != x else f"{x:.3g}" for x in column.tolist()] for column in (self.loss, self.null, self.random)
        ]
        amounts = ["" if amount is None else str(amount) for amount in self.amount]
        rows = list(zip(self.what, amounts, *cells, strict=True))
        return [
            table(("the model runs on", "n", "loss", "null", "random"), rows),
            f"{self.n_data_points} data points with {self.n_active:.3g} of {self.n_components} components active, "
            f"{self.n_never_active} never\n"
            f"The rest holds {self.rest:.1%} of the norm of the weights, components that are never active "
            f"{self.never_active:.1%}.\n"
            f"{self.matched:.0%} of active components have another one that is as often active.",
        ]


@no_inference_mode()
@checked
def audit(
    decomposition: Decomposition,
    batches: Iterable[Batch],
    *,
    masks: Callable[[Batch], Tensor] | None = None,
    ladder: Sequence[int] = (20, 40, 80, 160),
    unions: Sequence[int] = (1, 2, 4, 8),
    n_draws: int = 4,
    seed: int = 0,
    progress: bool = True,
) -> Audit:
    """Are inactive components inactive in the strict sense, so that no part of them in any combination changes the
    output?

    The model runs on γ_r (W − Σ P) + Σ_c γ_c P_c. Active components have γ = 1, or s where masks are fractions. If the
    others are inactive, no γ of theirs, and none of the rest, matters. Rows:

    - everything on (what rounding does), all components without the rest, active ones with the rest, active ones alone,
      nothing on;
    - the others and the rest at γ ~ U[0, 1]; off in a random subset of the matrices, of random size, for each data
      point; mean over draws;
    - the others and the rest where they do most harm in [0, 1], found by projected gradient ascent: γ of each data
      point's own, or one for all data. It is the worst of so many steps in all, so a lower bound of the true worst;
    - noise in the place of the others and the rest: random components of the same spectra, normal entries of the same
      norm;
    - active ones of so many other data points on as well, without the rest;
    - those that are never active out of the whole model; the null takes as many out at random;
    - out of the whole model those that are active. Here a large loss is good. The null takes out, for each of them,
      one that is inactive there and that is active on as many data points, within a factor of 2. Those without one stay
      on in both.

    Args:
        batches: what the data are. All of them are held in memory, with what the target makes of them.
        masks: function of a batch, as the model is called with it, that gives s, `batch C` or `batch pos C`, bool or
            in [0, 1]. Default: what the decomposition says. So components and masks of other methods are audited too.
        ladder: numbers of steps of the attack, rising. It starts where zero ablation or a draw did most harm. From one
            number n of steps to the next, steps of the signed gradient have the size 2.5 / n. The null of the first
            stands for all.
        unions: numbers of other data points, rising; those that there are too few data points for are left out.
        n_draws: number of random draws.
        progress: whether to show a bar.

    Raises:
        InvalidSetting: numbers that do not rise from 1; fewer than two data points; no output function.
        ShapeMismatch: masks of another shape, or with values outside [0, 1].
        NonFinite: a batch, or the target's output, holds NaN or infinity.

    Source: the paper's appendix on "inactive". The worst one is sought as in Madry et al. 2018.
    """
    _check(ladder, unions, n_draws)
    data, active = _read(decomposition, batches, masks)
    n = len(active)
    if n < 2:
        raise InvalidSetting("An audit compares data points, so it needs at least two; got one.")
    unions = [k for k in unions if k + 1 < n]
    components = decomposition.components.picked(range(decomposition.components.n_components))
    n_of_draws = n_draws * (4 if len(components.names) > 1 else 2)
    n_of_attacks = ladder[-1] + len(ladder) + ladder[0] + 2
    n_passes = (16 + 3 * len(unions) + n_of_draws + 2 * n_of_attacks) * len(data)
    with tqdm(total=n_passes, desc="audit", disable=not progress, mininterval=0.5, dynamic_ncols=True) as bar:
        order = torch.randperm(n, generator=draws(seed, "audit", "order"), device="cpu").to(active.device)
        runs = _Runs(decomposition, data, components, random_components(components, seed), order, seed, bar.update)
        own = _Masked(F.pad(active, (0, 1)), runs, n_draws)
        null = _Masked(runs.of_others(own.mask), runs, n_draws)
        rows = [
            *_on_and_off(runs, own, null),
            *_at_random(runs, own, null, n_draws),
            *_attacked(runs, own, null, ladder),
            _with_noise(runs, own, null),
            *(_with_others(runs, own, k) for k in unions),
            *_taken_out(runs, active),
        ]
    what, amount, *columns = zip(*rows, strict=True)
    never, matched = _never_active(active), usage_matched(active > 0, draws(seed, "audit", "twins"))[0]
    weights = [decomposition.target.weights[name].value() for name in components.names]
    dead = [components.summed(name, never) for name in components.names]
    return Audit(
        list(what),
        list(amount),
        *(torch.tensor(column, dtype=torch.float32, device="cpu") for column in columns),
        n_data_points=n,
        n_components=components.n_components,
        n_active=(active > 0).sum(1).float().mean().item(),
        n_never_active=int(never.sum()),
        rest=decomposition.residuals()["all"],
        never_active=_norm(dead) / _norm(weights),
        matched=(matched.sum() / (active > 0).sum().clamp_min(1)).item(),
    )


def _norm(matrices: Iterable[Tensor]) -> float:
    return math.hypot(*(matrix.float().norm().item() for matrix in matrices))


@dataclass(frozen=True, eq=False)
class _Data:
    """One batch.

    Attributes:
        output: the target's.
        places: of its data points among all.
        shape: `batch *pos` of its masks.
        n: number of distances between outputs.
    """

    inputs: Inputs
    output: Tensor
    valid: Valid
    places: slice
    shape: torch.Size
    n: int

    def spread(self, values: Float[Tensor, "data units"]) -> Float[Tensor, "batch *pos units"]:
        """What each data point of this batch has, with zeros at padding."""
        values = values[self.places]
        spread = values.new_zeros(*self.shape, values.shape[-1])
        valid = padded(spread, self.valid)
        if valid is None:
            return values.reshape(spread.shape)
        spread[valid] = values
        return spread


# The errors of the examples of each batch.
_Errors = list[Tensor]


class _Row(NamedTuple):
    what: str
    amount: int | None
    loss: float
    null: float = math.nan
    random: float = math.nan


@dataclass(frozen=True, eq=False)
class _Runs:
    """Passes over all data.

    Attributes:
        twins: random components.
        order: of all data points, in which each one's others come behind it.
        done: is called after each pass.
    """

    decomposition: Decomposition
    data: list[_Data]
    components: ParameterComponents
    twins: ParameterComponents
    order: Int[Tensor, " data"]
    seed: int
    done: Callable[[], object]

    def errors(self, batch: _Data, replaced: Intercept) -> Float[Tensor, " examples"]:
        """The sum over an example's data points of the distance to the target; infinite for NaN."""
        target, explained = self.decomposition.target, self.decomposition.output
        assert explained is not None
        with evaluating(target.model):
            output, _ = replaced_pass(target, self.components.names, replaced, batch.inputs, explained)
        output = output.to(batch.output.dtype)
        self.done()
        distances = distance_of_each(batch.output, output, self.decomposition.settings.losses.distance)
        if batch.valid is not None and distances.shape == batch.valid.shape:
            distances = distances.masked_fill(~batch.valid.to(distances.device), 0)
        sums = distances.reshape(len(distances), -1).sum(1).nan_to_num(torch.inf, torch.inf)
        return sums.to(self.order.device)  # where masks are

    @torch.no_grad()
    def __call__(self, make: Callable[..., Intercept], *values: Float[Tensor, "data units"]) -> _Errors:
        """The errors under what is made of values of each data point."""
        return [self.errors(batch, make(*map(batch.spread, values))) for batch in self.data]

    def mean(self, *errors: _Errors) -> float:
        """Over data points and draws."""
        total = sum(of_batch.double().sum() for of_draw in errors for of_batch in of_draw)
        return float(total) / (len(errors) * sum(batch.n for batch in self.data))

    def loss(self, shares: Float[Tensor, "data units"], random: bool = False) -> float:
        """With these shares of the components, or of random ones, and of the rest."""
        return self.mean(self(partial(_mixture, self.twins if random else self.components), shares))

    def of_others(self, values: Float[Tensor, "data units"], shift: int = 1) -> Float[Tensor, "data units"]:
        """What another data point has, for each one."""
        moved = torch.empty_like(values)
        moved[self.order] = values[self.order.roll(-shift)]
        return moved

    def uniform(self, name: str, draw: int, *shape: int) -> Tensor:
        """Draws from U[0, 1]."""
        generator = draws(self.seed, "audit", name, draw)
        return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu").to(self.order.device)


class _Masked:
    """A mask, with a last column of zeros for the rest, and the errors with none or a random part of the others on.

    Attributes:
        mask: `data units`.
        sources: which part of the others is on, `data units`; none first.
        errors: under each of them.
    """

    def __init__(self, mask: Float[Tensor, "data units"], runs: _Runs, n_draws: int):
        self.mask = mask
        drawn = [runs.uniform("part", draw, *mask.shape).to(mask) for draw in range(n_draws)]
        self.sources = [torch.zeros_like(mask), *drawn]
        self.errors = [runs(partial(_mixture, runs.components), mask + (1 - mask) * source) for source in self.sources]


def _read(
    decomposition: Decomposition, batches: Iterable[Batch], masks: Callable[[Batch], Tensor] | None
) -> tuple[list[_Data], Float[Tensor, "data C"]]:
    """All batches, and how active each component is on each data point."""
    data: list[_Data] = []
    active: list[Tensor] = []
    first = 0
    factor = next(decomposition.components.parameters())
    for batch in one_pass(batches):
        if masks is None:
            seen = decomposition.observe(batch)
            inputs, output, mask = seen.inputs, seen.output, seen.mask
        else:
            inputs, explained = ready(decomposition, batch, "audit")
            with torch.no_grad(), evaluating(decomposition.target.model):
                names = decomposition.components.names
                output, _ = replaced_pass(decomposition.target, names, as_it_is, inputs, explained)
            check_finite_output(output, "audit")
            mask = _checked(masks(inputs.batch), inputs.n_examples, decomposition.components.n_components)
        output = output.to(torch.promote_types(output.dtype, factor.dtype))
        distances = distance_of_each(output, output, decomposition.settings.losses.distance)
        active.append(without_padding(mask.to(factor), inputs.valid).flatten(0, -2))
        places = slice(first, first := first + len(active[-1]))
        n = one_row(distances, inputs.valid).numel()
        data.append(_Data(inputs, output, inputs.valid, places, mask.shape[:-1], n))
    return data, torch.cat(active)


def _on_and_off(runs: _Runs, own: _Masked, null: _Masked) -> Iterator[_Row]:
    off, on = torch.zeros_like(own.mask), torch.ones_like(own.mask)
    rest = off.clone()
    rest[:, -1] = 1
    yield _Row("everything", None, runs.loss(on))
    yield _Row("all components", None, runs.loss(on - rest))
    yield _Row("active ones and the rest", None, runs.loss(own.mask + rest), runs.loss(null.mask + rest))
    alone, alone_null = (runs.mean(some.errors[0]) for some in (own, null))
    yield _Row("active ones alone", None, alone, alone_null, runs.loss(own.mask, random=True))
    yield _Row("nothing", None, runs.loss(off))


def _at_random(runs: _Runs, own: _Masked, null: _Masked, n_draws: int) -> Iterator[_Row]:
    yield _Row("a random part of the others", None, *(runs.mean(*some.errors[1:]) for some in (own, null)))
    n, M = len(own.mask), len(runs.components.names)
    if M == 1:
        return
    errors: tuple[list[_Errors], list[_Errors]] = ([], [])
    for draw in range(n_draws):
        chosen = random_subsets(runs.uniform("sizes", draw, n, 1), runs.uniform("matrices", draw, n, M))
        for some, found in zip((own, null), errors, strict=True):
            shares = [torch.where(chosen[:, [place]], some.mask, 1.0) for place in range(M)]
            found.append(runs(partial(_by_matrix, runs.components), *shares))
    yield _Row("active ones alone, in some matrices", None, *(runs.mean(*found) for found in errors))


def _attacked(runs: _Runs, own: _Masked, null: _Masked, ladder: Sequence[int]) -> Iterator[_Row]:
    for what, attack in ((WORST_OF_EACH, _worst_of_each), (WORST_FOR_ALL, _worst_for_all)):
        (first,) = attack(runs, null, ladder[:1])
        for place, loss in enumerate(attack(runs, own, ladder)):
            yield _Row(what, ladder[place], loss, math.nan if place else first)


def _with_noise(runs: _Runs, own: _Masked, null: _Masked) -> _Row:
    rest = Mixture(_noise_like_rest(runs))

    def replaced(shares: Tensor) -> Intercept:
        """A component by its share, its random twin by what is left of that, and noise in the place of the rest."""
        kept, twins = Mixture(runs.components, shares[..., :-1]), Mixture(runs.twins, 1 - shares[..., :-1])
        return added(added(kept, twins), rest)

    return _Row("noise for the others", None, *(runs.mean(runs(replaced, some.mask)) for some in (own, null)))


def _with_others(runs: _Runs, own: _Masked, k: int) -> _Row:
    union, only_others = (
        torch.stack([runs.of_others(own.mask, shift) for shift in range(first, first + k + 1)]).amax(0)
        for first in (0, 1)
    )
    name = "with active ones of others"
    return _Row(name, k, runs.loss(union), runs.loss(only_others), runs.loss(union, random=True))


def _taken_out(runs: _Runs, active: Float[Tensor, "data C"]) -> Iterator[_Row]:
    def without(off: Tensor, random: bool = False) -> float:
        return runs.loss(F.pad((~off).to(active), (0, 1), value=1.0).expand(len(active), -1), random)

    never = _never_active(active)
    shuffled = never[runs.uniform("never", 0, len(never)).argsort()]
    losses = without(never), without(shuffled), without(never, random=True)
    yield _Row("all but those never active", int(never.sum()), *losses)
    own, partners = usage_matched(active > 0, draws(runs.seed, "audit", "twins"))
    yield _Row("all but the active ones", None, without(own), without(partners), without(own, random=True))


def _never_active(active: Float[Tensor, "data C"]) -> Bool[Tensor, " C"]:
    return ~(active > 0).any(0)


def _mixture(components: ParameterComponents, shares: Float[Tensor, "examples *pos units"]) -> Mixture:
    """The shares of the components and, last, of the rest."""
    return Mixture(components, shares[..., :-1], shares[..., -1])


def _by_matrix(components: ParameterComponents, *shares: Tensor) -> Intercept:
    """Shares of its own for each matrix."""
    return by_matrix({name: _mixture(components, of) for name, of in zip(components.names, shares, strict=True)})


@torch.no_grad()
def _noise_like_rest(runs: _Runs) -> ParameterComponents:
    """One component with normal entries, of the norm of W − Σ P in each matrix."""
    A, B = {}, {}
    for name in runs.components.names:
        summed = runs.components.summed(name)
        rest = runs.decomposition.target.weights[name].value().to(summed) - summed
        noise = torch.randn(rest.shape, generator=draws(runs.seed, "audit", name), dtype=rest.dtype, device="cpu")
        noise = noise.to(rest) * rest.norm() / rest.numel() ** 0.5
        eye = torch.eye(min(rest.shape), dtype=rest.dtype, device=rest.device)
        A[name], B[name] = (eye[None], noise[None]) if len(rest) <= rest.shape[1] else (noise[None], eye[None])
    return ParameterComponents(A, B).requires_grad_(False)


def _worst_of_each(runs: _Runs, some: _Masked, ladder: Sequence[int]) -> list[float]:
    """The largest mean loss on each rung, with a part of each of the others for each data point."""
    rungs: list[_Errors] = []
    for place, batch in enumerate(runs.data):
        s = batch.spread(some.mask)

        def errors_under(source: Tensor) -> Tensor:
            return runs.errors(batch, _mixture(runs.components, s + (1 - s) * source))  # noqa: B023

        hardest, largest = batch.spread(some.sources[0]), some.errors[0][place]
        for source, errors in zip(some.sources[1:], some.errors[1:], strict=True):
            hardest, largest = harder(hardest, largest, batch.spread(source), errors[place])
        rungs.append(_climb(errors_under, hardest, largest, ladder))
    return [runs.mean(list(rung)) for rung in zip(*rungs, strict=True)]


def _worst_for_all(runs: _Runs, some: _Masked, ladder: Sequence[int]) -> list[float]:
    """The same with one part of each of the others for all data."""

    def total_under(source: Float[Tensor, "1 units"]) -> Float[Tensor, " 1"]:
        """The sum over all data. The gradient of each batch is taken at once, so that one graph is held at a time."""
        total = source.new_zeros(1)
        for batch in runs.data:
            s = batch.spread(some.mask)

            def of_batch(source: Tensor) -> Tensor:
                return runs.errors(batch, _mixture(runs.components, s + (1 - s) * source)).sum()[None]  # noqa: B023

            if torch.is_grad_enabled():
                value, gradient = with_gradient(of_batch, source)
                total = total + value + (gradient * (source - source.detach())).sum()
            else:
                total = total + of_batch(source)
        return total

    none, part = some.sources[0][:1], some.sources[1][:1]  # where none is on there may be no gradient
    with torch.no_grad():
        drawn = total_under(part)
    of_none = torch.stack([of_batch.sum() for of_batch in some.errors[0]]).sum()[None]
    return [runs.mean([rung]) for rung in _climb(total_under, *harder(part, drawn, none, of_none), ladder)]


def _climb(
    errors_under: Callable[[Tensor], Tensor], hardest: Tensor, largest: Tensor, ladder: Sequence[int]
) -> list[Tensor]:
    """The largest error of each example after so many steps."""
    rungs, lowest = [], torch.zeros_like(hardest)
    for before, steps in pairwise([0, *ladder]):
        hardest, largest = ascend(errors_under, hardest, largest, lowest, 2.5 / steps, steps - before)
        rungs.append(largest)
    return rungs


def _checked(mask: object, n_examples: int, n_components: int) -> Tensor:
    """A mask that the user's function gives."""
    shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    if not isinstance(mask, Tensor) or mask.ndim < 2 or (len(mask), mask.shape[-1]) != (n_examples, n_components):
        raise ShapeMismatch(
            f"Expected masks= to return a mask of shape ({n_examples}, {n_components}) or ({n_examples}, pos, "
            f"{n_components}) for this batch, got {shape}."
        )
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise ShapeMismatch("Expected masks= to return values between 0 and 1, got others. Clamp them.")
    return mask.detach()


def _check(ladder: Sequence[int], unions: Sequence[int], n_draws: int) -> None:
    for name, numbers in (("ladder", ladder), ("unions", unions)):
        if not all(low < high for low, high in pairwise([0, *numbers])) or (name == "ladder" and not numbers):
            raise InvalidSetting(f"{name} must be whole numbers that rise from 1 or more, got {tuple(numbers)}.")
    if n_draws < 1:
        raise InvalidSetting(f"Expected n_draws of at least 1, got {n_draws}.")
