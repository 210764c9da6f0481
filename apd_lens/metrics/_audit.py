"""What "inactive" is worth: the model under maskings that change nothing if inactive components are inactive."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from apd_lens._block import no_inference_mode
from apd_lens._checks import checked
from apd_lens._draws import draws
from apd_lens._errors import InvalidSetting, ShapeMismatch
from apd_lens._table import frame, table
from apd_lens.components._components import ParameterComponents
from apd_lens.components._measures import random_components
from apd_lens.data._batch import Batch
from apd_lens.data._inputs import Inputs
from apd_lens.data._points import Valid, one_row, padded, without_padding
from apd_lens.data._stream import one_pass
from apd_lens.decomposition._decomposition import Decomposition, output_with, ready
from apd_lens.host._adapter import Intercept
from apd_lens.host._target import evaluating
from apd_lens.losses._outputs import distance_of_each
from apd_lens.masks._adversary import ascend, harder, with_gradient
from apd_lens.masks._sampling import usage_matched
from apd_lens.passes._replace import Mixture
from apd_lens.passes._watch import as_it_is, check_finite_output, replaced_pass

if TYPE_CHECKING:
    from pandas import DataFrame

# Where the rows of the attack are found among the others.
WORST_OF_EACH, WORST_FOR_ALL = "worst found for each data point, steps", "worst found for all, steps"


@dataclass(frozen=True, eq=False)
class Audit:
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
        """One row for each masking."""
        numbers = [-1 if n is None else n for n in self.amount]
        columns = {"what": self.what, "n": numbers, "loss": self.loss, "null": self.null, "random": self.random}
        return frame(columns)

    def __str__(self) -> str:
        cells = [
            ["" if x != x else f"{x:.3g}" for x in column.tolist()] for column in (self.loss, self.null, self.random)
        ]
        amounts = ["" if amount is None else str(amount) for amount in self.amount]
        rows = list(zip(self.what, amounts, *cells, strict=True))
        return (
            f"{table(('the model runs on', 'n', 'loss', 'null', 'random'), rows)}\n"
            f"{self.n_data_points} data points with {self.n_active:.3g} of {self.n_components} components active, "
            f"{self.n_never_active} never\n"
            f"The rest holds {self.rest:.1%} of the norm of the weights, components that are never active "
            f"{self.never_active:.1%}.\n"
            f"{self.matched:.0%} of active components have another one that is as often active."
        )

    __repr__ = __str__


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
    batches = list(one_pass(batches))
    components = decomposition.components.picked(range(decomposition.components.n_components))
    data, active = _read(decomposition, batches, masks)
    n = len(active)
    if n < 2:
        raise InvalidSetting("An audit compares data points, so it needs at least two; got one.")
    unions = [k for k in unions if k + 1 < n]
    n_of_draws = n_draws * (4 if len(components.names) > 1 else 2)
    n_of_attacks = ladder[-1] + len(ladder) + ladder[0] + 2
    n_passes = (16 + 3 * len(unions) + n_of_draws + 2 * n_of_attacks) * len(data)
    with tqdm(total=n_passes, desc="audit", disable=not progress, mininterval=0.5, dynamic_ncols=True) as bar:
        return _audited(_Runs(decomposition, data, bar.update), components, active, ladder, unions, n_draws, seed)


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


@dataclass(frozen=True, eq=False)
class _Runs:
    """Passes over all data."""

    decomposition: Decomposition
    data: list[_Data]
    done: Callable[[], object]

    def errors(self, batch: _Data, replaced: Intercept) -> Float[Tensor, " examples"]:
        """The sum over an example's data points of the distance to the target; infinite for NaN."""
        output = output_with(self.decomposition, batch.inputs, replaced).to(batch.output.dtype)
        self.done()
        distances = distance_of_each(batch.output, output, self.decomposition.settings.losses.distance)
        if batch.valid is not None and distances.shape == batch.valid.shape:
            distances = distances.masked_fill(~batch.valid, 0)
        return distances.reshape(len(distances), -1).sum(1).nan_to_num(torch.inf, torch.inf)

    @torch.no_grad()
    def __call__(self, make: Callable[..., Intercept], *values: Float[Tensor, "data units"]) -> _Errors:
        """The errors under what is made of values of each data point."""
        return [self.errors(batch, make(*map(batch.spread, values))) for batch in self.data]

    def mean(self, *errors: _Errors) -> float:
        """Over data points and draws."""
        total = sum(of_batch.double().sum() for of_draw in errors for of_batch in of_draw)
        return float(total) / (len(errors) * sum(batch.n for batch in self.data))


def _read(
    decomposition: Decomposition, batches: Sequence[Batch], masks: Callable[[Batch], Tensor] | None
) -> tuple[list[_Data], Float[Tensor, "data C"]]:
    """All batches, and how active each component is on each data point."""
    data: list[_Data] = []
    active: list[Tensor] = []
    first = 0
    factor = next(decomposition.components.parameters())
    for batch in batches:
        if masks is None:
            seen = decomposition.observe(batch)
            inputs, output, mask = seen.inputs, seen.output, seen.mask
        else:
            inputs, explained = ready(decomposition, batch, "audit")
            with torch.no_grad(), evaluating(decomposition.target.model):
                names = decomposition.components.names
                output, _ = replaced_pass(decomposition.target, names, as_it_is, inputs, explained, keep=True)
            check_finite_output(output, "audit")
            mask = _checked(masks(inputs.batch), inputs.n_examples, decomposition.components.n_components)
        output = output.to(torch.promote_types(output.dtype, factor.dtype))
        distances = distance_of_each(output, output, decomposition.settings.losses.distance)
        active.append(without_padding(mask.to(factor), inputs.valid).flatten(0, -2))
        places = slice(first, first := first + len(active[-1]))
        n = one_row(distances, inputs.valid).numel()
        data.append(_Data(inputs, output, inputs.valid, places, mask.shape[:-1], n))
    return data, torch.cat(active)


def _audited(
    runs: _Runs,
    components: ParameterComponents,
    active: Float[Tensor, "data C"],
    ladder: Sequence[int],
    unions: Sequence[int],
    n_draws: int,
    seed: int,
) -> Audit:
    n, C = active.shape
    twins = random_components(components, seed)
    order = torch.randperm(n, generator=draws(seed, "audit", "order")).to(active.device)

    def of_others(values: Tensor, shift: int) -> Tensor:
        """What another data point has, for each one."""
        moved = torch.empty_like(values)
        moved[order] = values[order.roll(-shift)]
        return moved

    def uniform(name: str, draw: int, *shape: int) -> Tensor:
        generator = draws(seed, "audit", name, draw)
        return torch.rand(shape, generator=generator, dtype=active.dtype, device="cpu").to(active.device)

    def under(shares: Tensor, of: ParameterComponents = components) -> float:
        return runs.mean(runs(partial(_mixture, of), shares))

    rows: list[tuple[str, int | None, float, float, float]] = []

    def add(what: str, loss: float, null: float = torch.nan, random: float = torch.nan, n: int | None = None) -> None:
        rows.append((what, n, loss, null, random))

    s = F.pad(active, (0, 1))  # the rest is off
    other = of_others(s, 1)
    ones = torch.ones_like(s)
    add("everything", under(ones))
    add("all components", under(F.pad(ones[:, 1:], (0, 1))))
    rest = F.pad(torch.zeros_like(active), (0, 1), value=1.0)
    add("active ones and the rest", under(s + rest), under(other + rest))
    # Both with their errors, from where the attacks start.
    starts = {"own": [(torch.zeros_like(s), runs(partial(_mixture, components), s))]}
    starts["null"] = [(torch.zeros_like(s), runs(partial(_mixture, components), other))]
    add("active ones alone", runs.mean(starts["own"][0][1]), runs.mean(starts["null"][0][1]), under(s, twins))
    add("nothing", under(torch.zeros_like(s)))

    for draw in range(n_draws):
        source = uniform("part", draw, *s.shape)
        for mask, found in ((s, starts["own"]), (other, starts["null"])):
            found.append((source, runs(partial(_mixture, components), mask + (1 - mask) * source)))
    drawn, drawn_null = (runs.mean(*(errors for _, errors in found[1:])) for found in starts.values())
    add("a random part of the others", drawn, drawn_null)
    if (M := len(components.names)) > 1:
        errors: dict[str, list[_Errors]] = {"own": [], "null": []}
        for draw in range(n_draws):
            sizes = 1 + (M * uniform("sizes", draw, n, 1)).long()
            chosen = uniform("matrices", draw, n, M).argsort(1).argsort(1) < sizes
            for name, mask in (("own", s), ("null", other)):
                shares = [torch.where(chosen[:, [place]], mask, 1.0) for place in range(M)]
                errors[name].append(runs(partial(_by_matrix, components), *shares))
        add("active ones alone, in some matrices", runs.mean(*errors["own"]), runs.mean(*errors["null"]))

    for what, attack in ((WORST_OF_EACH, _worst_of_each), (WORST_FOR_ALL, _worst_for_all)):
        null = attack(runs, components, other, starts["null"], ladder[:1])
        for steps, loss in zip(ladder, attack(runs, components, s, starts["own"], ladder), strict=True):
            add(what, loss, null[0] if steps == ladder[0] else torch.nan, n=steps)

    noise = partial(_with_noise, components, twins, _noise_like_rest(runs.decomposition, components, seed))
    add("noise for the others", runs.mean(runs(noise, s)), runs.mean(runs(noise, other)))

    for k in unions:
        with_others, only_others = (
            torch.stack([of_others(s, shift) for shift in range(first, first + k + 1)]).amax(0) for first in (0, 1)
        )
        add("with active ones of others", under(with_others), under(only_others), under(with_others, twins), k)

    never = ~(active > 0).any(0)
    shuffled = never[uniform("never", 0, C).argsort()]
    kept, kept_null = (F.pad((~off).to(s), (0, 1), value=1.0).expand(n, -1) for off in (never, shuffled))
    add("all but those never active", under(kept), under(kept_null), under(kept, twins), int(never.sum()))

    own, matched = usage_matched(active > 0, draws(seed, "audit", "twins"))
    without, without_matched = (F.pad((~off).to(s), (0, 1), value=1.0) for off in (own, matched))
    add("all but the active ones", under(without), under(without_matched), under(without, twins))

    what, amount, *values = zip(*rows, strict=True)
    weights = {name: runs.decomposition.target.weights[name].value() for name in components.names}
    whole = torch.stack([weight.float().norm() for weight in weights.values()]).norm()
    dead = torch.stack([components.summed(name, never).norm() for name in components.names]).norm()
    return Audit(
        list(what),
        list(amount),
        *(torch.tensor(column, dtype=torch.float32, device="cpu") for column in values),
        n_data_points=n,
        n_components=C,
        n_active=(active > 0).sum(1).float().mean().item(),
        n_never_active=int(never.sum()),
        rest=runs.decomposition.residuals()["all"],
        never_active=(dead / whole).item(),
        matched=(own.sum() / (active > 0).sum().clamp_min(1)).item(),
    )


def _mixture(components: ParameterComponents, shares: Float[Tensor, "examples *pos units"]) -> Mixture:
    """The shares of the components and, last, of the rest."""
    return Mixture(components, shares[..., :-1], shares[..., -1])


def _by_matrix(components: ParameterComponents, *shares: Tensor) -> Intercept:
    """Shares of its own for each matrix."""
    mixtures = {name: _mixture(components, of) for name, of in zip(components.names, shares, strict=True)}
    return lambda use, x, original, bias: mixtures[use.matrix](use, x, original, bias)


def _with_noise(
    components: ParameterComponents, twins: ParameterComponents, rest: ParameterComponents, shares: Tensor
) -> Intercept:
    """A component by its share, its random twin by what is left of that, and noise in the place of the rest."""
    kept, lost, noise = Mixture(components, shares[..., :-1]), Mixture(twins, 1 - shares[..., :-1]), Mixture(rest)

    def replaced(use, x, original, bias):  # type: ignore[no-untyped-def]
        return kept(use, x, original, bias) + lost(use, x, original, None) + noise(use, x, original, None)

    return replaced


@torch.no_grad()
def _noise_like_rest(decomposition: Decomposition, components: ParameterComponents, seed: int) -> ParameterComponents:
    """One component with normal entries, of the norm of W − Σ P in each matrix."""
    A, B = {}, {}
    for name in components.names:
        summed = components.summed(name)
        size = (decomposition.target.weights[name].value().to(summed) - summed).norm() / summed.numel() ** 0.5
        noise = torch.randn(summed.shape, generator=draws(seed, "audit", name), dtype=summed.dtype, device="cpu")
        noise, d_in, d_out = noise.to(summed) * size, *summed.shape
        eye = torch.eye(min(d_in, d_out)).to(summed)
        A[name], B[name] = (eye, noise) if d_in <= d_out else (noise, eye)
        A[name], B[name] = A[name][None], B[name][None]
    return ParameterComponents(A, B).requires_grad_(False)


# Places of the attack that were tried, and the errors there.
_Starts = list[tuple[Float[Tensor, "data units"], _Errors]]


def _worst_of_each(
    runs: _Runs, components: ParameterComponents, mask: Tensor, starts: _Starts, ladder: Sequence[int]
) -> list[float]:
    """The largest mean loss on each rung, with shares of each data point's own."""
    rungs: list[_Errors] = []
    for place, batch in enumerate(runs.data):
        s = batch.spread(mask)

        def errors_under(source: Tensor) -> Tensor:
            return runs.errors(batch, _mixture(components, s + (1 - s) * source))  # noqa: B023

        tried = [(batch.spread(source), errors[place]) for source, errors in starts]
        hardest, largest = tried[0]
        for source, errors in tried[1:]:
            hardest, largest = harder(hardest, largest, source, errors)
        rungs.append(_climb(errors_under, hardest, largest, ladder))
    return [runs.mean(list(rung)) for rung in zip(*rungs, strict=True)]


def _worst_for_all(
    runs: _Runs, components: ParameterComponents, mask: Tensor, starts: _Starts, ladder: Sequence[int]
) -> list[float]:
    """The same with one share of each component, and of the rest, for all data. It starts anywhere, as at 0 there may
    be no gradient."""

    def total_under(source: Float[Tensor, "1 units"]) -> Float[Tensor, " 1"]:
        """The sum over all data, of which each batch's gradient is taken at once."""
        total = source.new_zeros(1)
        for batch in runs.data:
            s = batch.spread(mask)

            def of_batch(source: Tensor) -> Tensor:
                return runs.errors(batch, _mixture(components, s + (1 - s) * source)).sum()[None]  # noqa: B023

            if torch.is_grad_enabled():
                value, gradient = with_gradient(of_batch, source)
                total = total + value + (gradient * (source - source.detach())).sum()
            else:
                total = total + of_batch(source)
        return total

    hardest = starts[1][0][:1]
    with torch.no_grad():
        largest = total_under(hardest)
    zero = torch.stack([of_batch.sum() for of_batch in starts[0][1]]).sum()[None]
    hardest, largest = harder(hardest, largest, torch.zeros_like(hardest), zero)
    return [runs.mean([rung]) for rung in _climb(total_under, hardest, largest, ladder)]


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
