"""Cluster moves: components that write or read in two directions are split, twins are merged, and what is missing is
given to one that does nothing.

Of gradient descent alone a component often comes out that holds two mechanisms, while another mechanism is halved
between two components. Time does not cure it, since simplicity rewards it. The moves look at inputs, masks and weights
only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apd_lens._block import no_grad
from apd_lens._checks import check_fields
from apd_lens._codec import saved
from apd_lens.components._components import ParameterComponents
from apd_lens.components._factors import MatrixInput as Inputs
from apd_lens.components._factors import inner_products
from apd_lens.components._products import inner_activations
from apd_lens.data._points import without_padding
from apd_lens.host._matrix import Use
from apd_lens.moves._moves import MoveContext, check_every
from apd_lens.moves._surgery import Split, inputs_of_data_points, refactor, settle, split_component

# A component is free if it is active less often than this share of the mean.
_FREE = 0.1
# Contributions smaller than this share of a component's largest one have no say in what directions it writes.
_SMALL = 0.2
# What has two clusters with a larger cosine is one direction.
_ONE_DIRECTION = 0.98
# A cluster whose unit vectors have a mean longer than this is one input, and not a part of a cloud.
_NARROW = 0.9
# Of the split. Each data point of a cluster has other mechanisms on as well, which it is not to be split by.
_RIDGE = 0.1


@saved
@dataclass(frozen=True)
class ClusterMoves:
    """Settings of cluster moves, which split, merge and revive components.

    Attributes:
        every: steps between moves.
        until: share of the steps after which no more are made. A component may still take another's mechanism when
            simplicity decays and k grows; and what was moved needs steps to settle.
        noise: standard deviation of the noise that is added to the factors of the changed components.
        merge_above: two components are merged if the cosine between them, in parameter space, is above this; 1 for
            no merges.
        split_below: a component is split if what it writes falls into two clusters whose mean directions have a cosine
            below this; -1 for no such splits.
        split_read_below: a component that writes in one direction is split if its inputs fall into two such clusters,
            but for what all inputs have in common, and one of these is narrow: two facts with one answer; -1 for no
            such splits.
        smallest: share of the data points that the smaller cluster must have.
        fewest: data points that a component must be active on in the batch, to be split.
        separation: a component is split only if, in one matrix at least, the two parts do this much of what it did,
            each for its own data points: 2 is all, for two directions that have nothing to do with each other; 1 is one
            direction that is cut in two. What fills a plane, or more dimensions, is in between.
        residual: whether to add W − Σ_c P_c to a free component, so that it finds work. This alone, without splits
            and merges, revives few: what the others leave undone is little. Not where there are other data, since it
            then belongs to the rest.
    """

    every: int = 100
    until: float = 0.75
    noise: float = 5e-3
    merge_above: float = 0.7
    split_below: float = 0.9
    split_read_below: float = 0.5
    smallest: float = 0.15
    fewest: int = 2
    separation: float = 1.2
    residual: bool = True

    UNSAVED: ClassVar[dict[str, float]] = {"split_read_below": -1.0}  # of decompositions of apd_lens 0.2
    needs_active: ClassVar[bool] = True
    has_start: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self)
        check_every(self)

    def start(self, components: ParameterComponents, weights: Mapping[str, Float[Tensor, "..."]]) -> None:
        """Changes nothing."""

    @no_grad()
    def __call__(self, context: MoveContext) -> int:
        """Merges, splits and gives the residual away; returns how many moves were made."""
        components, weights, active = context.components, context.weights, context.active
        assert active is not None
        inputs = inputs_of_data_points(components, active, context.watched.valid, context.watched.calls)
        of_points = without_padding(active, context.watched.valid).flatten(0, -2)
        n_held = of_points.sum(0)
        held = n_held.tolist()
        free = [c for c, n in enumerate(held) if n < _FREE * sum(held) / len(held)]
        busy = [c for c in range(len(held)) if c not in free]
        touched: set[int] = set()

        pairs = twins(components, weights, busy, self.merge_above) if self.merge_above < 1 else []
        for larger, smaller in pairs:
            _merge(components, larger, smaller)
            touched |= {larger, smaller}
            free.append(smaller)
        n_moves = len(touched) // 2

        free.sort(key=lambda c: held[c])
        signed = [_SignedInputs.of(use, x) for use, x in inputs] if free else []
        for old in sorted(set(busy) - touched, key=lambda c: -held[c]):
            if not free:
                break
            split = plan_cluster_split(components, weights, old, of_points[:, old], signed, self)
            if split is not None and split_component(
                components, replace(split, new=free[0]), inputs, _RIDGE, self.separation
            ):
                touched |= {old, free.pop(0)}
                n_moves += 1
        if self.residual and context.sums_to_weights and free:
            norms = similarities(components, weights, free).diagonal()
            smallest = free[int(norms.argmin())]
            for name, weight in weights.items():
                _add(components, name, smallest, weight - components.summed(name))
            if components.gates is not None:
                components.gates.reset(smallest)
            touched.add(smallest)
            n_moves += 1
        settle(components, context.optimizer, sorted(touched), self.noise, context.generator)
        return n_moves


def twins(
    components: ParameterComponents, weights: Mapping[str, Tensor], among: Sequence[int], above: float
) -> list[tuple[int, int]]:
    """Pairs (larger, smaller) of components whose cosine is above a number, most alike first, each in one pair only."""
    inner = similarities(components, weights, among)
    norms = inner.diagonal().clamp_min(torch.finfo(inner.dtype).tiny).sqrt()
    cosines = (inner / norms[:, None] / norms).triu(1)
    pairs, taken = [], set()
    for flat in cosines.flatten().argsort(descending=True).tolist():
        one, other = divmod(flat, len(among))
        if cosines[one, other] <= above:
            break
        if not taken & {one, other}:
            taken |= {one, other}
            larger, smaller = (one, other) if norms[one] >= norms[other] else (other, one)
            pairs.append((among[larger], among[smaller]))
    return pairs


def similarities(
    components: ParameterComponents, weights: Mapping[str, Tensor], among: Sequence[int]
) -> Float[Tensor, "n n"]:
    """Σ_l <P_c,l , P_e,l> / ‖W_l‖² for all pairs of some components, from their factors."""
    total = torch.zeros(len(among), len(among), device=components.A[components.names[0]].device, dtype=torch.float32)
    for name, weight in weights.items():
        A, B = components.A[name][list(among)], components.B[name][list(among)]
        total += (inner_products(A, B, A, B) / weight.square().sum()).to(total.device)
    return total


@dataclass(frozen=True, eq=False)
class _SignedInputs:
    """The inputs of one use of a matrix, each as x or −x, whichever has its largest entry positive: for a linear map
    they are one input. Rows of a lookup have no sign.

    Attributes:
        x: as they are.
        signs, mean, mean_square: of floating-point inputs; the mean of signed ones, and the mean square without it.
    """

    use: Use
    x: Inputs
    signs: Float[Tensor, "data *pos 1"] | None = None
    mean: Float[Tensor, " pos_d_in"] | None = None
    mean_square: Float[Tensor, ""] | None = None

    @classmethod
    def of(cls, use: Use, x: Inputs) -> "_SignedInputs":
        if not x.is_floating_point():
            return cls(use, x)
        signs = x.gather(-1, x.abs().argmax(-1, keepdim=True)).sign()
        flat = (x * signs).flatten(1)
        mean = flat.mean(0)
        mean_square = (flat - mean).square().sum(1).mean().clamp_min(torch.finfo(flat.dtype).tiny)
        return cls(use, x, signs, mean, mean_square)

    def at(self, where: Int[Tensor, " some"]) -> Inputs:
        """Signed, at some data points."""
        where = where.to(self.x.device)
        return self.x[where] if self.signs is None else self.x[where] * self.signs[where]

    def inner_products(self, where: Int[Tensor, " some"]) -> Float[Tensor, "some some"]:
        """At some data points, in units of the mean square of all, and but for what all have in common; of rows the
        share of positions that have the same."""
        some = self.at(where).reshape(len(where), -1)
        if self.mean is None or self.mean_square is None:
            rows = some.float()  # exact below 2²⁴
            return 1 - torch.cdist(rows, rows, p=0) / rows.shape[1]
        some = some - self.mean
        return (some @ some.mT / self.mean_square).float()


def plan_cluster_split(
    components: ParameterComponents,
    weights: Mapping[str, Tensor],
    component: int,
    active: Bool[Tensor, " data"],
    inputs: Sequence[_SignedInputs],
    moves: ClusterMoves,
) -> Split | None:
    """A split of a component's active data points, by what it writes there, or by what it reads if it writes in one
    direction; None if it is one.

    Inner products of all matrices are added up, each in units of what the whole matrix can write, or of its inputs.
    """
    where = active.nonzero()[:, 0]
    if len(where) < moves.fewest:
        return None
    written = torch.zeros(len(where), len(where), device=active.device)
    for one in inputs:
        A, B = components.factors(one.use)
        some = one.at(where)
        h = inner_activations(some, A[[component]]).flatten(1, -2)  # data pos m
        size = some.flatten(1).norm(dim=1).square().mean() if some.is_floating_point() else 1.0
        unit = weights[one.use.matrix].square().sum() * size + torch.finfo(h.dtype).tiny
        inner = (h @ (B[component] @ B[component].mT)).flatten(1) @ h.flatten(1).mT
        written += (inner / unit).to(written.device)
    sizes = written.diagonal().clamp_min(0).sqrt()
    large = sizes > _SMALL * sizes.max()
    if int(large.sum()) < 2:
        return None
    where = where[large]
    in_first, cosine, _ = _clusters(written[large][:, large])
    below = moves.split_below
    if cosine > _ONE_DIRECTION:
        read = torch.stack([one.inner_products(where).to(written.device) for one in inputs]).sum(0)
        in_first, cosine, narrow = _clusters(read)
        below = moves.split_read_below if narrow > _NARROW else -1.0
    if cosine > below or below <= -1 or not moves.smallest < in_first.float().mean() < 1 - moves.smallest:
        return None
    given, kept = torch.zeros_like(active), torch.zeros_like(active)
    given[where], kept[where] = in_first, ~in_first
    return Split(old=component, new=component, given=given, kept=kept)


def _clusters(inner: Float[Tensor, "n n"]) -> tuple[Bool[Tensor, " n"], float, float]:
    """`opposite_clusters` of vectors whose inner products are given."""
    norms = inner.diagonal().clamp_min(torch.finfo(inner.dtype).tiny).sqrt()
    return opposite_clusters(inner / norms[:, None] / norms)


def opposite_clusters(cosines: Float[Tensor, "n n"], rounds: int = 10) -> tuple[Bool[Tensor, " n"], float, float]:
    """Spherical 2-means, started from two vectors that are far apart: who is in the first cluster, the cosine between
    the clusters' mean directions (1 if there is only one), and how narrow the narrower cluster is: the length of the
    mean of its unit vectors."""
    first = cosines[cosines.sum(0).argmin()]  # of all with a mean direction
    second = cosines[first.argmin()]
    in_first, cosine, narrow = first > second, 1.0, 0.0
    for _ in range(rounds):
        if bool(in_first.all()) or not bool(in_first.any()):
            return in_first, 1.0, 0.0
        members = torch.stack([in_first, ~in_first]).to(cosines.dtype)
        sums = members @ cosines  # of all with the sum of a cluster
        inner = sums @ members.mT
        norms = inner.diagonal().clamp_min(torch.finfo(inner.dtype).tiny).sqrt()
        first, second = sums / norms[:, None]
        narrow = float((norms / members.sum(1)).max())
        in_first, cosine = first > second, float(inner[0, 1] / norms[0] / norms[1])
    return in_first, cosine, narrow


def _merge(components: ParameterComponents, larger: int, smaller: int) -> None:
    for name in components.names:
        A, B = components.A[name], components.B[name]
        refactor(A, B, larger, torch.cat([A[larger], A[smaller]], 1), torch.cat([B[larger], B[smaller]]))
        A[smaller], B[smaller] = 0.0, 0.0
    if components.gates is not None:
        components.gates.join(larger, smaller)


def _add(components: ParameterComponents, name: str, component: int, matrix: Float[Tensor, "d_in d_out"]) -> None:
    """Adds the matrix, as far as it fits into the component's rank."""
    A, B = components.A[name], components.B[name]
    U, singular_values, Vh = torch.linalg.svd(matrix, full_matrices=False)
    m = min(A.shape[-1], len(singular_values))
    left, right = U[:, :m] * singular_values[:m], Vh[:m]
    refactor(A, B, component, torch.cat([left, A[component]], 1), torch.cat([right, B[component]]))
