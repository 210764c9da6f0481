"""Components fitted to data in closed form, before any training."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from apd_lens._block import full_precision, no_grad, no_inference_mode
from apd_lens._errors import InvalidSetting, NonFinite
from apd_lens.components._components import ParameterComponents
from apd_lens.data._batch import Batch
from apd_lens.data._inputs import Inputs
from apd_lens.data._points import Granularity
from apd_lens.data._stream import one_pass
from apd_lens.host._target import TargetModel
from apd_lens.losses._outputs import Distance
from apd_lens.passes._output import OutputFn
from apd_lens.start._fitted import dual_basis, groups_at_once, padded_rows, truncated
from apd_lens.start._groups import centred, cosines, grouped, similarities_of_points
from apd_lens.start._rows import OtherInputs, Rows, other_inputs, rows_of

# Only so many data points are looked at, each with so many projections of the outputs.
MOST_POINTS = 2**12
PROJECTIONS = 8

# Inputs that matter less than this share of the one that matters most are left out.
_NOTHING = 1e-3
# What is added to the metric, as a share of its mean diagonal.
_METRIC_RIDGE = 1e-3
# All that is not fitted is made this much smaller than it was drawn.
_TINY = 0.01


@dataclass(frozen=True, eq=False)
class _Regression:
    """What components should do in one matrix: of y = x W the share that is their own.

    Attributes:
        weight: W, transposed where x comes from the other side.
        transposed: whether it does.
        rows: the inputs x.
        shared: `places d`, the mean input at each place; 0 where a data point is alone in its shape. None for lookups.
        own: `rows d`, x less the mean at its place. None for lookups.
        importance, importance_of_own: root mean square of the first-order effects of x W, and of the own part alone, on
            projections of the output.
        importance_of_shared: the root of the sum of squares of the means' effects at each place.
        metric: second moments of the others' inputs, or (W Wᵀ)⁻¹ without others, made invertible. None for lookups.
    """

    weight: Float[Tensor, "d d_out"]
    transposed: bool
    rows: Rows
    shared: Float[Tensor, "places d"] | None
    own: Float[Tensor, "rows d"] | None
    importance: Float[Tensor, " rows"]
    importance_of_own: Float[Tensor, " rows"]
    importance_of_shared: Float[Tensor, " places"]
    metric: Float[Tensor, "d d"] | None


@no_inference_mode()
@full_precision()
def fit_to_data(
    target: TargetModel,
    components: ParameterComponents,
    weights: Mapping[str, Float[Tensor, "d_in d_out"]],
    batches: Iterable[Batch | Inputs],
    others: Iterable[Batch | Inputs] | None,
    output: OutputFn,
    *,
    distance: Distance = "mse",
    granularity: Granularity = "example",
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Int[Tensor, " points"]:
    """Component 0 does what all data points share, each further one the rest of what one of them, or a group, does.

    At each place (a position of data points of one shape) the mean input x̄ is shared and x − x̄ is a data point's own.
    Others of the same shape count in the mean, so that what is left of a data point without its component is what any
    such input would do.
    On an input x of group g, component 0 should give x̄ W, component g (x − x̄) W, all others 0; and they should do
    little to inputs of other data. With inputs X, their importance for the output D, and the second moments G of the
    others' inputs,

        P_g = (ε G + Xᵀ D² X)⁻¹ Xᵀ D² T_g,    T_0 = X̄ W,    T_g = (X − X̄) W in the rows of g and 0 elsewhere,

    cut to the rank of the components where it matters least. ε is a thousandth of the mean of D² x G⁻¹ xᵀ. The
    importance of an input is the root mean square of the first-order effects of x W on 8 random projections of the
    output, as a share of the largest in its matrix. Where no matrix has any (a clamp or a softmax is at its end on all
    the data), the size of x W stands for it.

    In a matrix whose rows are looked up, component g gets the rows that only its data points look up, and component 0
    those that several do. A matrix that is multiplied from both sides is fitted to the inputs of its longer side. With
    at most `n_components − 1` different data points each is a group. More are grouped by what they do to the output,
    see `grouped`. Factors in which nothing is fitted are those drawn, a hundred times smaller.

    Args:
        components: changed in place.
        weights: name -> matrix, of all components.
        batches: the target data. The first 4096 data points count, fewer where their gradients take more than 1 GiB, or
            they have more than 4096 positions in all, and fewer where `memory` is limited.
        others: data on which components should do little, all of which is run. Without them components should sum to
            the weights, and G is (W Wᵀ)⁻¹, made invertible: then input sides are made of those of W, and where the
            target data use all of a matrix of low rank, the components sum to it.
        distance: of the minimality loss. With "kl" effects are those on the output's distribution.
        generator: of the projections, on the CPU.
        progress: whether to show a bar, if it takes over a second.

    Returns:
        The component of each data point that was looked at.

    Raises:
        InvalidSetting: fewer than two components.
        InvalidBatches: no batch.
        NonFinite: a gradient is NaN or infinite.
    """
    if components.n_components < 2:
        raise InvalidSetting(
            "A start fitted to data takes one component for what data points share and others for what they do not; "
            f"got n_components={components.n_components}."
        )
    names, seed = list(weights), int(torch.randint(2**31, (), generator=generator, device="cpu"))
    compares = "distributions" if distance == "kl" else "numbers"
    with _bar("start, batches", None, progress) as bar:
        some = _counted(one_pass(batches), bar)
        rows = rows_of(target, names, some, output, granularity, PROJECTIONS, seed, MOST_POINTS, compares)
        elsewhere = {} if others is None else other_inputs(target, names, _counted(one_pass(others), bar), output, rows)
    with no_grad(), _bar("start, matrices", 2 * len(weights), progress) as bar:

        def regressions() -> Iterator[tuple[str, _Regression]]:
            for name, weight in weights.items():  # one at a time, since each takes as much as several of its matrices
                transposed = max((side[1] for side in rows.of_sides if side[0] == name), key=lambda t: weight.shape[t])
                side = (name, transposed)
                yield name, _regression(weight, transposed, rows.of_sides[side], elsewhere.get(side))
                bar.update()

        groups = _groups(_checked(regressions()), len(rows.shapes), components.n_components - 1)
        components_of_points = 1 + groups.to(next(iter(weights.values())).device)
        for name, regression in regressions():
            A, B = components.A[name].mul_(_TINY), components.B[name].mul_(_TINY)
            fit = _fit if regression.rows.x.is_floating_point() else _fit_lookups
            fit(regression, components_of_points.to(A.device), *((B.mT, A.mT) if regression.transposed else (A, B)))
    return components_of_points


def _bar(what: str, total: int | None, shown: bool) -> tqdm:
    """It is shown only if it takes longer than a second."""
    return tqdm(total=total, desc=what, disable=not shown, delay=1, dynamic_ncols=True)


def _counted(batches: Iterable[Batch | Inputs], bar: tqdm) -> Iterator[Batch | Inputs]:
    for batch in batches:
        yield batch
        bar.update()


def _regression(
    weight: Float[Tensor, "d_in d_out"], transposed: bool, rows: Rows, others: OtherInputs | None
) -> _Regression:
    weight, x, places = (weight.mT if transposed else weight).double(), rows.x, rows.places

    def importance(written: Float[Tensor, "rows d_out"]) -> Float[Tensor, " rows"]:
        return (rows.gradients * written.to(rows.gradients.dtype)).sum(-1).square().mean(0).sqrt().double()

    if not x.is_floating_point():
        of_rows = importance(weight[x])
        return _Regression(weight, transposed, rows, None, None, of_rows, of_rows, of_rows[:0], None)
    x = x.double()
    counts = torch.bincount(places).to(x)
    shared = x.new_zeros(len(counts), x.shape[1]).index_add_(0, places, x)
    if others is not None:
        counts, shared = counts + others.counts.to(x), shared + others.sums.to(x)
    shared *= torch.where(counts > 1, 1 / counts, 0.0)[:, None]  # what is alone at its place has nothing to share
    own = x - shared[places]
    moments = weight @ weight.mT if others is None else others.moments.to(x)
    mean = moments.diagonal().mean()
    metric = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    if mean > 0:
        metric = moments + _METRIC_RIDGE * mean * metric
    if others is None:
        metric = metric.inverse()
    of_rows, of_own = importance(x @ weight), importance(own @ weight)
    squares = torch.zeros_like(shared[:, 0]).index_add_(0, places, importance((shared @ weight)[places]).square())
    return _Regression(weight, transposed, rows, shared, own, of_rows, of_own, squares.sqrt(), metric)


def _checked(regressions: Iterable[tuple[str, _Regression]]) -> Iterator[_Regression]:
    """The same, if their gradients are finite."""
    for name, regression in regressions:
        if not bool(regression.importance.isfinite().all()):
            raise NonFinite(f"The gradient of the output at {name} is NaN or infinite on the target data.")
        yield regression


def _groups(regressions: Iterable[_Regression], n_points: int, most: int) -> Int[Tensor, " points"]:
    """The group of each data point, by the cosines of Σ_t x_t ⊗ g_t over its own rows, in the metric of the others.

    Those of a matrix count as much as the squared effects of own rows there.
    """
    similarities = torch.zeros(n_points, n_points, dtype=torch.float64, device="cpu")
    squares = similarities.new_zeros(n_points)
    for of in regressions:
        kept = of.importance_of_own > _NOTHING * of.importance_of_own.max()
        if not bool(kept.any()):
            continue
        rows = of.rows
        if of.own is None or of.metric is None:
            products = centred((rows.x[kept, None] == rows.x[kept]).double(), rows.places[kept])
        else:
            L = torch.linalg.cholesky(of.metric)
            whitened = torch.linalg.solve_triangular(L, of.own[kept].mT, upper=False)
            products = whitened.mT @ whitened
        gram = similarities_of_points(products, rows.gradients[:, kept], rows.points[kept], n_points)
        done = of.importance_of_own[kept].square()
        similarities += (done.sum() * cosines(gram)).to(similarities.device)
        squares.index_add_(0, rows.points[kept].to(squares.device), done.to(squares.device))
    return grouped(similarities / squares.sum().clamp_min(torch.finfo(squares.dtype).tiny), squares.sqrt(), most)


def _fit(
    regression: _Regression,
    components_of_points: Int[Tensor, " points"],
    A: Float[Tensor, "C d m"],
    B: Float[Tensor, "C m d_out"],
) -> None:
    """Component 0 maps each input to what the mean at its place is mapped to, and its own component to the rest."""
    of, largest = regression, regression.importance.max()
    own, shared, metric = of.own, of.shared, of.metric
    assert own is not None
    assert shared is not None
    assert metric is not None
    kept, has_own = of.importance > _NOTHING * largest, of.importance_of_own > _NOTHING * largest
    if not bool(kept.any()):
        return
    dual = torch.zeros_like(own)
    dual[kept] = dual_basis(of.rows.x[kept].double(), of.importance[kept] / largest, metric)
    of_places = torch.zeros_like(shared).index_add_(0, of.rows.places, dual)
    owners = components_of_points[of.rows.points[has_own]]
    owners = torch.cat([owners.new_zeros(len(of_places)), owners])
    lefts = torch.cat([of_places, dual[has_own]])
    rights = torch.cat([shared, own[has_own]]) @ of.weight
    importance = torch.cat([of.importance_of_shared, of.importance_of_own[has_own]])
    for numbers, picked in groups_at_once(owners, sum(of.weight.shape)):
        weights = padded_rows(importance[:, None], picked)[..., 0]
        left, right = truncated(padded_rows(lefts, picked).mT, padded_rows(rights, picked), weights, A.shape[-1])
        _put(A, B, numbers, left, right)


def _fit_lookups(
    regression: _Regression,
    components_of_points: Int[Tensor, " points"],
    A: Float[Tensor, "C d m"],
    B: Float[Tensor, "C m d_out"],
) -> None:
    """Component g gets the rows that only its data points look up, component 0 those that several do."""
    looked_up, numbers = regression.rows.x.unique(return_inverse=True)
    of_rows = components_of_points[regression.rows.points]
    least, largest = (
        torch.zeros_like(looked_up).scatter_reduce(0, numbers, of_rows, how, include_self=False)
        for how in ("amin", "amax")
    )
    for some, picked in groups_at_once(torch.where(least == largest, least, 0), sum(regression.weight.shape)):
        written = padded_rows(regression.weight[looked_up], picked)
        eye = torch.eye(picked.shape[1], dtype=written.dtype, device=written.device).expand(len(some), -1, -1)
        of_picked, right = truncated(eye, written, torch.ones_like(written[..., 0]), A.shape[-1])
        left = written.new_zeros(len(some), len(regression.weight), of_picked.shape[-1])
        there = (picked >= 0).nonzero(as_tuple=True)
        left[there[0], looked_up[picked[there]]] = of_picked[there]
        _put(A, B, some, left, right)


def _put(
    A: Float[Tensor, "C d m"],
    B: Float[Tensor, "C m d_out"],
    numbers: Int[Tensor, " groups"],
    left: Float[Tensor, "groups d k"],
    right: Float[Tensor, "groups k d_out"],
) -> None:
    """Writes factors into the first k inner dimensions of some components, but for those that are 0: in both factors
    they would stay 0 in training."""
    k = left.shape[-1]
    sizes = right.norm(dim=-1)
    there = sizes > 1e-5 * sizes.max()
    A[numbers, :, :k] = torch.where(there[:, None], left.to(A), A[numbers, :, :k])
    B[numbers, :k] = torch.where(there[..., None], right.to(B), B[numbers, :k])
