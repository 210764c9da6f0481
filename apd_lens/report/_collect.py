"""The numbers of a report: one pass over the data with the components, and beside them with random ones."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apd_lens._block import no_inference_mode
from apd_lens.components._measures import effective_rank, random_components, singular_values
from apd_lens.data._batch import Batch
from apd_lens.data._stream import one_pass
from apd_lens.decomposition._decomposition import Decomposition, output_with
from apd_lens.decomposition._observed import Observed
from apd_lens.masks._selection import K
from apd_lens.metrics._stability import cosines, squared_norms
from apd_lens.passes._replace import Mixture
from apd_lens.responses._ablation import ablation_effects, distances, known_distance
from apd_lens.responses._responses import Effects, Responses, TopExamples
from apd_lens.responses._top import at_positions, look, respond

# Data points in the figures that need a number for each: the attribution matrix, and the loss by k.
_IN_MATRIX, _IN_CURVE = 200, 1024
# Components that are named at a token, and tokens that have them: those of the first examples of each component.
_N_HERE, _TOKENS = 5, 20_000


@dataclass(frozen=True, eq=False)
class Run:
    """What one set of components does on the data.

    Attributes:
        sparse: distance of the output on the selected components alone from the target's, mean over examples.
        n_active: mean number of active components of a data point.
        first_active: number of the first data point on which each was active; that of data points if on none.
        by_k: distances at each of `Numbers.ks`, on the first data points.
        residuals: as of `Decomposition.residuals`.
        effects: of taking each component out on the top examples of the real one.
    """

    sparse: float
    n_active: float
    first_active: Int[Tensor, " C"]
    by_k: list[float]
    residuals: dict[str, float]
    effects: Effects

    def n_alive(self, n_data_points: int) -> int:
        return int((self.first_active < n_data_points).sum())


# Number of an example -> components with the largest attributions at each of its positions, and these attributions.
Here = dict[int, tuple[Int[Tensor, "pos few"], Float[Tensor, "pos few"]]]


@dataclass(frozen=True, eq=False)
class Elsewhere:
    """Other data, such as general text: share of data points on which each component is active, top examples."""

    active: Float[Tensor, " C"]
    n_data_points: int
    top: TopExamples
    here: Here


@dataclass(frozen=True, eq=False)
class Numbers:
    """All numbers of a report.

    Attributes:
        found, null: of the components, and of random ones with the same singular values in every matrix.
        nothing: distance with no component on, mean over examples.
        ks: numbers of active components of a data point.
        n_in_curve: data points that the distances by k are means over.
        sample: attributions of some data points, drawn at random.
        shares: of a component's squared norm that lies in each matrix.
        ranks: effective rank in each matrix.
        norms: Frobenius norm in each matrix.
        alike: cosine of components with each other, over all matrices in units of ‖W_l‖; −1 with themselves.
        alike_null: the largest cosine of each with a random component.
        here: of the top examples.
        others: what components do on other data, if it was given.
    """

    responses: Responses
    found: Run
    null: Run
    nothing: float
    ks: list[int]
    n_in_curve: int
    sample: Float[Tensor, "data C"]
    shares: Float[Tensor, "C matrices"]
    ranks: Float[Tensor, "C matrices"]
    norms: Float[Tensor, "C matrices"]
    alike: Float[Tensor, "C C"]
    alike_null: Float[Tensor, " C"]
    here: Here
    others: Elsewhere | None


@dataclass(eq=False)
class _Running:
    """Sums of one set of components, batch after batch."""

    decomposition: Decomposition
    ks: list[int]
    first_active: Tensor
    n_data_points: int = 0
    n_examples: int = 0
    n_active: int = 0
    sparse: float = 0.0
    nothing: float = 0.0
    by_k: list[float] = field(default_factory=list)
    examples_in_curve: int = 0
    points_in_curve: int = 0

    @staticmethod
    def of(decomposition: Decomposition, ks: list[int]) -> "_Running":
        never = torch.full((decomposition.components.n_components,), torch.iinfo(torch.long).max, device="cpu")
        return _Running(decomposition, ks, never, by_k=[0.0] * len(ks))

    def add(self, some: Observed, with_nothing: bool = False) -> None:
        mask = some.data(some.mask).cpu()
        first = mask.int().argmax(0) + self.n_data_points
        self.first_active = torch.where(mask.any(0), first.minimum(self.first_active), self.first_active)
        self.n_active += int(mask.sum())
        self.sparse += self.distance(some, some.mask)
        if with_nothing:
            self.nothing += self.distance(some, torch.zeros_like(some.attributions))
        if self.points_in_curve < _IN_CURVE:
            for i, k in enumerate(self.ks):
                self.by_k[i] += self.distance(some, some.select(k))
            self.examples_in_curve += len(some.mask)
            self.points_in_curve += len(mask)
        self.n_data_points += len(mask)
        self.n_examples += len(some.mask)

    @no_inference_mode()
    def distance(self, some: Observed, mask: Tensor) -> float:
        """Of the output on these components alone from the target's, summed over examples."""
        with torch.no_grad():
            sparse = output_with(self.decomposition, some.inputs, Mixture(self.decomposition.components, mask))
        distance = known_distance(self.decomposition)
        return distances(some.output.float(), sparse.float(), distance, some.valid).sum().item()

    def run(self, effects: Effects) -> Run:
        return Run(
            sparse=self.sparse / self.n_examples,
            n_active=self.n_active / max(1, self.n_data_points),
            first_active=self.first_active.clamp_max(self.n_data_points),
            by_k=[total / self.examples_in_curve for total in self.by_k],
            residuals=self.decomposition.residuals(),
            effects=effects,
        )


def collect(
    decomposition: Decomposition,
    batches: Iterable[Batch],
    others: Iterable[Batch] | None = None,
    *,
    examples: int,
    k: K | None,
    seed: int,
    **measured: Any,
) -> Numbers:
    """All numbers; arguments as of `apd_lens.responses`, `measured` being those of `ablation_effects`."""
    components = decomposition.components
    ks = _numbers_of_components(components.n_components)
    null = replace(decomposition, components=random_components(components, seed))
    running, running_null = _Running.of(decomposition, ks), _Running.of(null, ks)
    sample = _Sample(torch.Generator().manual_seed(seed))

    def watched() -> Iterator[Observed]:
        for batch in one_pass(batches):
            some = decomposition.observe(batch, k)
            running.add(some, with_nothing=True)
            running_null.add(null.observe(some.inputs, k))
            sample.add(some.data(some.attributions))
            yield some

    found = respond(decomposition, watched(), examples, **measured)
    null_effects = ablation_effects(decomposition, found.top, components=null.components, **measured)
    spectra = [singular_values(components, name).cpu() for name in components.names]
    norms = torch.stack([spectrum.norm(dim=1) for spectrum in spectra], 1)
    squares = norms.square()
    memory = measured["memory"]
    scales = squared_norms(decomposition)
    return Numbers(
        responses=found,
        found=running.run(found.effects),
        null=running_null.run(null_effects),
        nothing=running.nothing / running.n_examples,
        ks=ks,
        n_in_curve=running.points_in_curve,
        sample=sample.rows,
        shares=squares / squares.sum(1, keepdim=True).clamp_min(torch.finfo(squares.dtype).tiny),
        ranks=torch.stack([effective_rank(spectrum) for spectrum in spectra], 1),
        norms=norms,
        alike=cosines(components, components, scales).fill_diagonal_(-1).cpu(),
        alike_null=cosines(components, null.components, scales).amax(1).cpu(),
        here=_here(decomposition, found.top, memory),
        others=None if others is None else _elsewhere(decomposition, others, examples, k, memory),
    )


def _elsewhere(
    decomposition: Decomposition, batches: Iterable[Batch], examples: int, k: K | None, memory: int
) -> Elsewhere:
    observations = (decomposition.observe(batch, k) for batch in one_pass(batches))
    seen = look(decomposition, observations, examples, memory)
    active = seen["together"].counts.diagonal() / max(1, seen["n_data_points"])
    return Elsewhere(active, seen["n_data_points"], seen["top"], _here(decomposition, seen["top"], memory))


def _here(decomposition: Decomposition, top: TopExamples, memory: int) -> Here:
    """Of the first examples of every component, then of the second ones, as far as the tokens go."""
    here: Here = {}
    width = 1 if top.positions is None else top.positions.shape[2]
    numbers = islice(dict.fromkeys(top.example.T.flatten().tolist()), max(1, _TOKENS // width))
    some = replace(top, read={number: top.read[number] for number in numbers})

    def keep(numbers: list[int], found: Tensor) -> None:
        values, which = found.cpu().topk(min(_N_HERE, found.shape[-1]))
        here.update(zip(numbers, zip(which, values, strict=True), strict=True))

    at_positions(decomposition, some, keep, memory)
    return here


def alike_in_weights(one: Decomposition, other: Decomposition) -> Float[Tensor, "C D"]:
    """Cosine of the components of two decompositions in the matrices that both have; NaN if there are none."""
    scales = {name: s for name, s in squared_norms(one).items() if name in other.components.names}
    if not scales:
        return _unknown(one, other)
    return cosines(one.components, other.components, scales).cpu()


def alike_in_activity(
    one: Decomposition, other: Decomposition, batches: Iterable[Batch], k: K | None
) -> Float[Tensor, "C D"]:
    """Jaccard index of the data points on which components are active; NaN where these are not the same for both."""
    both = _unknown(one, other)
    if one.settings.selection.granularity != other.settings.selection.granularity:
        return both
    together, alone, others = torch.zeros_like(both), *(torch.zeros(n, device="cpu") for n in both.shape)
    for batch in batches:
        left, right = (some.observe(batch, k) for some in (one, other))
        left, right = left.data(left.mask).float().cpu(), right.data(right.mask).float().cpu()
        if len(left) != len(right):
            return both
        together, alone, others = together + left.T @ right, alone + left.sum(0), others + right.sum(0)
    return together / (alone[:, None] + others - together).clamp_min(1)


def _unknown(one: Decomposition, other: Decomposition) -> Float[Tensor, "C D"]:
    shape = one.components.n_components, other.components.n_components
    return torch.full(shape, float("nan"), dtype=torch.float32, device="cpu")


def _numbers_of_components(n: int) -> list[int]:
    """Nine from 1 to n, each about as many times larger than the one before."""
    return sorted({round(n ** (i / 8)) for i in range(9)})


@dataclass(eq=False)
class _Sample:
    """Rows drawn at random from a stream: those with the largest of random keys, in the order in which they came."""

    generator: torch.Generator
    rows: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float32, device="cpu"))
    keys: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float32, device="cpu"))

    def add(self, rows: Float[Tensor, "data C"]) -> None:
        keys = torch.cat(
            [self.keys, torch.rand(len(rows), generator=self.generator, dtype=torch.float32, device="cpu")]
        )
        kept = keys.topk(min(_IN_MATRIX, len(keys))).indices.sort().values
        n_before = len(self.keys)
        old, new = kept[kept < n_before], kept[kept >= n_before] - n_before
        added = rows[new.to(rows.device)].float().cpu()
        self.rows = torch.cat([self.rows[old], added]) if n_before else added
        self.keys = keys[kept]
