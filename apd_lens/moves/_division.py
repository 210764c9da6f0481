"""Division moves: one component starts as the whole model, and is divided into mechanisms that act on different data.

From random factors gradient descent may find no mechanism that only matters as a whole, such as neurons that are off
unless all that feeds them is there. The other way round nothing has to be found: the whole works from the first step.
Data points are alike if the same weights carry what a component does there to the outputs; where they fall into two
groups, every matrix is divided between them, on whichever side the groups differ. The moves look at inputs,
attributions and gradients only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apd_lens._block import no_grad
from apd_lens._checks import check_fields
from apd_lens._codec import saved
from apd_lens._errors import InvalidSetting
from apd_lens.components._components import ParameterComponents
from apd_lens.components._products import inner_activations
from apd_lens.data._points import without_padding
from apd_lens.host._matrix import Use
from apd_lens.moves._moves import MoveContext, check_every
from apd_lens.moves._start import start_as_a_whole
from apd_lens.moves._surgery import inputs_of_data_points, of_data_points, part_for, refactor, settle
from apd_lens.passes._cotangents import random_cotangents
from apd_lens.passes._watch import WatchedPass

# A component is free if its attributions sum to less than this share of the mean.
_FREE = 0.1
# Where a component does less than this share of what it does at most, it is not asked how it does it.
_SMALL = 0.02
# A data point tells the groups apart if this share of its similarity is to its own.
_CLEAR = 0.9
# Of a clean division, in which each part does all for its data points, the shares done add up to 2.
_MIN_SEPARATION = 1.5
_FEWEST_DATA_POINTS = 8
# Data points (times positions) that a component's division is planned on.
_MOST_ROWS = 1024


@saved
@dataclass(frozen=True)
class DivisionMoves:
    """Settings of division moves. Component 0 starts as the whole weights, as far as its rank can hold them, and is
    divided.

    Attributes:
        every: steps between moves.
        until: share of the steps after which no more moves are made.
        noise: standard deviation of the noise that is added to the factors of the changed components.
        divide_above: a component is divided if the second eigenvalue of the similarity of its data points, normalised
            to 1 for the first, is above this: 1 for two groups with nothing in common, less the more they overlap.
        smallest: least share of the data points in the smaller group.
        projections: number of random projections of the outputs whose gradients are used.
    """

    every: int = 25
    until: float = 0.6
    noise: float = 1e-3
    divide_above: float = 0.7
    smallest: float = 0.1
    projections: int = 4

    needs_active: ClassVar[bool] = True
    has_start: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        check_every(self)
        if self.projections < 1:
            raise InvalidSetting(f"DivisionMoves needs projections >= 1, got {self.projections}.")

    def start(self, components: ParameterComponents, weights: Mapping[str, Float[Tensor, "..."]]) -> None:
        """Component 0 becomes the whole weights; all others are made tiny."""
        start_as_a_whole(components, weights)

    @no_grad()
    def __call__(self, context: MoveContext) -> int:
        """Divides components, and their parts again, while there are free ones; returns how often."""
        components, active = context.components, context.active
        assert active is not None
        valid, device = context.watched.valid, next(components.parameters()).device
        of_points = without_padding(active, valid).flatten(0, -2).to(device)
        done = (without_padding(context.attributions, valid).flatten(0, -2).to(device) * of_points).sum(0)
        order = done.argsort(descending=True).tolist()
        is_free = (done < _FREE * done.mean()).tolist()
        free = [c for c in reversed(order) if is_free[c]]
        todo = [(c, of_points[:, c].nonzero()[:, 0]) for c in order if not is_free[c]]
        touched: set[int] = set()
        n_moves = 0
        flows = flows_of_data_points(components, active, context.watched, self.projections) if free else []
        while todo and free:
            old, where = todo.pop(0)
            where = where[: max(_FEWEST_DATA_POINTS, _MOST_ROWS // _positions(flows))]
            groups = divide(components, old, free[0], [flow.at(where) for flow in flows], self)
            if groups is not None:
                todo += [(free[0], where[groups]), (old, where[~groups])]
                touched |= {old, free.pop(0)}
                n_moves += 1
        settle(components, context.optimizer, sorted(touched), self.noise, context.generator)
        return n_moves


@dataclass(frozen=True, eq=False)
class Flow:
    """What went into one use of a matrix, and what comes back: x `data *pos d_in` (or rows), g `data *pos v d_out`."""

    use: Use
    x: Tensor
    g: Tensor

    def at(self, where: Int[Tensor, " some"]) -> "Flow":
        """The same on some data points."""
        where = where.to(self.x.device)
        return replace(self, x=self.x[where], g=self.g[where])


def flows_of_data_points(
    components: ParameterComponents, mask: Bool[Tensor, "batch *pos C"], watched: WatchedPass, projections: int
) -> list[Flow]:
    """x and gradients at the first use of every matrix, for random projections of the outputs of the target."""
    fresh = watched.again(None, slice(None))
    generator = torch.Generator(fresh.output.device).manual_seed(0)
    v = random_cotangents(fresh.output, projections, "rademacher", generator).rows(0, projections)
    gradients = [
        torch.autograd.grad(
            fresh.output, [call.y for call in fresh.calls], some.expand_as(fresh.output), retain_graph=True,
            allow_unused=True, materialize_grads=True,
        )
        for some in v
    ]  # fmt: skip
    flows = []
    for use, x in inputs_of_data_points(components, mask, fresh.valid, fresh.calls):
        of_use = [i for i, call in enumerate(fresh.calls) if (call.use.matrix, call.use.site) == (use.matrix, use.site)]
        heads = of_use if fresh.calls[of_use[0]].use.columns != slice(None) else of_use[:1]
        g = torch.cat([torch.stack([some[i] for some in gradients], -2) for i in heads], -1)
        g = of_data_points(g, mask, fresh.valid)
        flows.append(Flow(use, x, g.to(components.A[use.matrix].dtype)))
    return flows


def divide(
    components: ParameterComponents, old: int, new: int, flows: Sequence[Flow], moves: DivisionMoves
) -> Bool[Tensor, " data"] | None:
    """Gives part of a component to another, on top of what that had, so that each serves one group of data points.

    Returns:
        which data points are the new one's; None if the component is one thing, and stays as it was.
    """
    device = next(components.parameters()).device
    kinds = torch.cat([how_it_acts(flow, *_factors(components, flow.use, old)).to(device) for flow in flows], 1)
    size = kinds.norm(dim=1)
    asked = (size > _SMALL * size.max()).nonzero()[:, 0] if len(size) else size.long()
    if len(asked) < _FEWEST_DATA_POINTS:
        return None
    in_first, clear, eigenvalue = two_groups(F.normalize(kinds[asked], dim=1))
    share = in_first.float().mean().item()
    given, kept = asked[in_first & clear], asked[~in_first & clear]
    if eigenvalue < moves.divide_above or not moves.smallest < share < 1 - moves.smallest:
        return None
    if min(len(given), len(kept)) < _FEWEST_DATA_POINTS // 2:
        return None
    parts, separations = [], []
    for flow in flows:
        left, right, separation = best_part(flow, *_factors(components, flow.use, old), given, kept)
        parts.append((left, right))
        separations.append(separation)
    if max(separations) < _MIN_SEPARATION:
        return None
    for flow, (left, right) in zip(flows, parts, strict=True):
        A, B = components.factors(flow.use)
        refactor(A, B, new, torch.cat([left, A[new]], 1), torch.cat([right, B[new]]))
        refactor(A, B, old, torch.cat([A[old], -left], 1), torch.cat([B[old], right]))
    if components.gates is not None:
        components.gates.copy_to(new, old)
    groups = torch.zeros(len(size), dtype=torch.bool, device=size.device)
    groups[asked[in_first]] = True
    return groups


def how_it_acts(flow: Flow, A: Float[Tensor, "d_in m"], B: Float[Tensor, "m d_out"]) -> Float[Tensor, "data numbers"]:
    """Σ_pos x P ⊗ g of each data point, x P in coordinates of the m dimensions that P can write to.

    Inner products of these are Σ_pos,pos' <x P , x' P> <g , g'>, whatever the basis: large if the same is written and
    the same of it is read.
    """
    coordinates = torch.linalg.qr(B.mT)[1]  # B = Rᵀ Qᵀ
    written = inner_activations(flow.x, (A @ coordinates.mT)[None]).reshape(len(flow.x), _positions([flow]), -1)
    g = flow.g.reshape(len(flow.g), _positions([flow]), *flow.g.shape[-2:])
    return einsum(written, g, "data pos m, data pos v d_out -> data v m d_out").flatten(1)


def two_groups(
    directions: Float[Tensor, "data d"],
) -> tuple[Bool[Tensor, " data"], Bool[Tensor, " data"], float]:
    """Normalised cut of unit vectors by their cosines (0 where negative): who is in the first group, who is clearly in
    either, and the second eigenvalue of the normalised similarity.

    The cut is the best one along the second eigenvector. Source: Shi and Malik 2000.
    """
    alike = (directions @ directions.mT).clamp_min(0)
    root = alike.sum(1).rsqrt()
    eigenvalues, vectors = torch.linalg.eigh(root[:, None] * alike * root)
    order = (vectors[:, -2] * root).argsort()
    ordered = alike[order][:, order]
    volume = ordered.sum(1).cumsum(0)[:-1]
    cut = volume - ordered.cumsum(0).cumsum(1).diagonal()[:-1]
    best = (cut / volume + cut / (ordered.sum() - volume)).argmin()
    in_first = torch.zeros(len(directions), dtype=torch.bool, device=directions.device)
    in_first[order[best + 1 :]] = True
    to_first = alike[:, in_first].sum(1) / alike.sum(1)
    return in_first, torch.where(in_first, to_first, 1 - to_first) > _CLEAR, eigenvalues[-2].item()


def best_part(
    flow: Flow,
    A: Float[Tensor, "d_in m"],
    B: Float[Tensor, "m d_out"],
    given: Int[Tensor, " given"],
    kept: Int[Tensor, " kept"],
) -> tuple[Float[Tensor, "d_in m"], Float[Tensor, "m d_out"], float]:
    """Of the parts Π P and P Π, the one that does most for the given and least for the kept data points, and how well.

    Π is found on the inputs x, or on the gradients g; by ridge regression (`part_for`), or coordinate by coordinate:
    the diagonal that is nearest to keeping all of the given and nothing of the kept effects. Neurons have coordinates
    of their own, residual streams have not. What a part has in common with the rest counts against it.

    Returns:
        factors of the part, and 2 − ‖missing‖ / ‖done for given‖ − ‖left over‖ / ‖done for kept‖, of effects.
    """
    P, here, there = A @ B, flow.at(given), flow.at(kept)
    by_output = [_effects(some, P).square().flatten(0, -2).sum(0) for some in (here, there)]
    g = (here.g.flatten(0, -2), there.g.flatten(0, -2))
    candidates = [
        (part_for(A, here.x, there.x), B),
        (A, part_for(B.mT, *g).mT),
        (A, B * _share(*by_output)),
    ]
    if flow.x.is_floating_point():
        by_input = [(some.x[..., None, :] * (some.g @ P.mT)).square().flatten(0, -2).sum(0) for some in (here, there)]
        candidates.append((A * _share(*by_input)[:, None], B))

    tiny = torch.finfo(P.dtype).tiny
    done = [_effects(some, P).norm().clamp_min(tiny) for some in (here, there)]

    def separation(left: Tensor, right: Tensor) -> tuple[float, float]:
        part = left @ right
        rest = P - part
        error = _effects(here, rest).norm() / done[0] + _effects(there, part).norm() / done[1]
        common = 2 * (part * rest).sum().abs() / P.square().sum().clamp_min(tiny)
        return (2 - error - common).item(), (2 - error).item()

    scores = [separation(*candidate) for candidate in candidates]
    best = max(range(len(scores)), key=lambda index: scores[index])
    return *candidates[best], scores[best][1]


def _share(given: Float[Tensor, " d"], kept: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """given / (given + kept), 0 where neither is anything."""
    return given / (given + kept).clamp_min(torch.finfo(given.dtype).tiny)


def _effects(flow: Flow, P: Float[Tensor, "d_in d_out"]) -> Float[Tensor, "data *pos v d_out"]:
    """x P ⊙ g: what each coordinate that is written does to each projection of the outputs."""
    return inner_activations(flow.x, P[None]) * flow.g


def _factors(components: ParameterComponents, use: Use, component: int) -> tuple[Tensor, Tensor]:
    A, B = components.factors(use)
    return A[component], B[component]


def _positions(flows: Sequence[Flow]) -> int:
    return max(flow.g.shape[1:-2].numel() for flow in flows)
