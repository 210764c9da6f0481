"""Components fitted to data in closed form, before any training."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apd_lens._block import full_precision, no_grad, no_inference_mode
from apd_lens._errors import InvalidBatches, InvalidSetting, NonFinite
from apd_lens.components._components import ParameterComponents
from apd_lens.data._batch import Batch
from apd_lens.data._inputs import Inputs
from apd_lens.data._points import Granularity
from apd_lens.data._stream import one_pass
from apd_lens.host._target import TargetModel
from apd_lens.passes._output import OutputFn
from apd_lens.start._fitted import dual_basis, groups_at_once, padded_rows, truncated
from apd_lens.start._groups import centred, cosines, grouped, less_means, similarities_of_points
from apd_lens.start._rows import Rows, rows_of, second_moments

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
    """What components should do in one matrix: x P = x W for some inputs x each, and 0 for those of the others.

    Attributes:
        weight: W, transposed where x comes from the other side.
        transposed: whether it does.
        x: `shared + rows d`: the mean at each place, 0 where a data point is alone in its shape; then each input less
            the mean at its place. For lookups the numbers looked up, `rows`.
        importance: root mean square of the first-order effects of x W on projections of the output.
        own: the rows behind the means.
        metric: second moments of the others' inputs, made invertible.
    """

    weight: Float[Tensor, "d d_out"]
    transposed: bool
    x: Float[Tensor, "inputs d"] | Int[Tensor, " rows"]
    importance: Float[Tensor, " inputs"]
    own: Rows
    metric: Float[Tensor, "d d"] | None

    @property
    def n_shared(self) -> int:
        return len(self.x) - len(self.own.points)


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
    distance: Any = "mse",
    granularity: Granularity = "example",
    generator: torch.Generator | None = None,
) -> Int[Tensor, " points"]:
    """Component 0 does what all data points share, each further one what a group of them does alone: x_j P_g =
    [j in g] x_j W for their inputs, and little for inputs of other data.

    For every matrix, and over the positions of all data points, the mean input at a place is shared and the rest of
    each input is its own. With R these rows, R_g those of group g, D how much each matters for the output, and G the
    second moments of the others' inputs,

        P_g = (ε G + Rᵀ D² R)⁻¹ R_gᵀ D² R_g W,

    cut to the rank of the components. In a matrix whose rows are looked up, component g gets the rows that only its
    data points use, and component 0 those that several use. A matrix that is multiplied from both sides is fitted to
    the inputs of its longer side.

    With at most `n_components − 1` data points each is a group. More are grouped by what they do to the output, see
    `grouped`. Factors in which nothing is fitted are those drawn, a hundred times smaller.

    Args:
        components: changed in place.
        weights: name -> matrix, of all components.
        batches: the target data. The first 4096 data points count, fewer where their gradients take more than 1 GiB.
        others: data on which components should do little; None for a metric that is the identity.
        distance: of the minimality loss. With "kl" effects are those on the output's distribution.
        generator: of the projections, on the CPU.

    Returns:
        The component of each data point that was looked at.

    Raises:
        InvalidSetting: fewer than two components.
        InvalidBatches: no batch, or nothing that the matrices do there matters for the output.
        NonFinite: a gradient is NaN or infinite.
        MissingExtra: data points must be grouped, and scipy is not installed.
    """
    if components.n_components < 2:
        raise InvalidSetting(
            "A start fitted to data takes one component for what data points share and others for what they do not; "
            f"got n_components={components.n_components}."
        )
    explained, names = _in_metric(output, distance), list(weights)
    seed = int(torch.randint(2**31, (), generator=generator))
    rows = rows_of(target, names, one_pass(batches), explained, granularity, PROJECTIONS, seed, MOST_POINTS)
    with no_grad():
        moments = {} if others is None else second_moments(target, names, one_pass(others), output)
        regressions = {}
        for name, weight in weights.items():
            transposed = max((side[1] for side in rows.of_sides if side[0] == name), key=lambda t: weight.shape[t])
            side = (name, transposed)
            regressions[name] = _regression(weight, transposed, rows.of_sides[side], moments.get(side))
        _check_importances({name: regression.importance for name, regression in regressions.items()})
        components_of_points = 1 + _groups(list(regressions.values()), len(rows.shapes), components.n_components - 1)
        for name, regression in regressions.items():
            A, B = components.A[name].mul_(_TINY), components.B[name].mul_(_TINY)
            fit = _fit if regression.x.is_floating_point() else _fit_lookups
            fit(regression, components_of_points, *((B.mT, A.mT) if regression.transposed else (A, B)))
    return components_of_points


def _in_metric(output: OutputFn, distance: Any) -> OutputFn:
    """For "kl" z = √p ∘ (logits − Σ p · logits), p constant: Σ dz² is twice the KL, to second order. Else as it is."""
    if distance != "kl":
        return output

    def explained(value: Any) -> Tensor:
        logits = output(value)
        p = logits.detach().softmax(-1)
        return p.sqrt() * (logits - (p * logits).sum(-1, keepdim=True))

    return explained


def _regression(
    weight: Float[Tensor, "d_in d_out"], transposed: bool, rows: Rows, moments: Float[Tensor, "d d"] | None
) -> _Regression:
    weight = (weight.mT if transposed else weight).double()
    gradients = rows.gradients
    if not rows.x.is_floating_point():
        effects = (gradients * weight[rows.x].to(gradients.dtype)).sum(-1)
        return _Regression(weight, transposed, rows.x, effects.square().mean(0).sqrt().double(), rows, None)
    x = rows.x.double()
    own = less_means(x, rows.places)
    n_places = int(rows.places.max()) + 1
    counts = torch.bincount(rows.places, minlength=n_places)
    shared = x.new_zeros(n_places, x.shape[1]).index_add_(0, rows.places, x - own).div_(counts[:, None])
    squares_of_shared, squares_of_own = (
        (gradients * some.to(gradients.dtype)).sum(-1).square().mean(0).double()
        for some in ((shared @ weight)[rows.places], own @ weight)
    )
    mean_squares = x.new_zeros(n_places).index_add_(0, rows.places, squares_of_shared).div_(counts)
    metric = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    if moments is not None and (mean := moments.diagonal().mean()) > 0:
        metric = moments.to(x) + _METRIC_RIDGE * mean * metric
    importance = torch.cat([mean_squares, squares_of_own]).sqrt()
    return _Regression(weight, transposed, torch.cat([shared, own]), importance, rows, metric)


def _check_importances(importances: Mapping[str, Float[Tensor, " inputs"]]) -> None:
    for name, importance in importances.items():
        if not bool(importance.isfinite().all()):
            raise NonFinite(f"The gradient of the output at {name} is NaN or infinite on the target data.")
    if not any(bool(importance.any()) for importance in importances.values()):
        raise InvalidBatches(
            "On the target data the output does not depend on any of the decomposed matrices, so there is nothing to "
            "fit. Check output= and weights=, and that the output is not the same whatever they are (a softmax that is "
            "1 for one of the outputs)."
        )


def _groups(regressions: list[_Regression], n_points: int, most: int) -> Int[Tensor, " points"]:
    """The group of each data point, by the cosines of Σ_t x_t ⊗ g_t over its own rows, in the metric of the others.

    Those of a matrix count as much as the squared effects of own rows there.
    """
    if n_points <= most:
        return torch.arange(n_points, device=regressions[0].x.device)
    similarities = regressions[0].importance.new_zeros(n_points, n_points)
    squares = similarities.new_zeros(n_points)
    for of in regressions:
        importance = of.importance[of.n_shared :]
        kept = importance > _NOTHING * importance.max()
        x, points = of.x[of.n_shared :][kept], of.own.points[kept]
        if not len(x):
            continue
        if of.metric is None:
            products = centred((x[:, None] == x).double(), of.own.places[kept])
        else:
            Z = torch.linalg.solve_triangular(torch.linalg.cholesky(of.metric), x.mT, upper=False).mT
            products = Z @ Z.mT
        gram = similarities_of_points(products, of.own.gradients[:, kept], points, n_points)
        done = importance[kept].square()
        similarities += done.sum() * cosines(gram)
        squares.index_add_(0, points, done)
    return grouped(similarities / squares.sum(), squares.sqrt(), most)


def _fit(
    regression: _Regression,
    components_of_points: Int[Tensor, " points"],
    A: Float[Tensor, "C d m"],
    B: Float[Tensor, "C m d_out"],
) -> None:
    importance = regression.importance / regression.importance.max()
    kept = importance > _NOTHING
    if not bool(kept.any()):
        return
    of_own = components_of_points[regression.own.points]
    owners = torch.cat([of_own.new_zeros(regression.n_shared), of_own])[kept]
    x = regression.x[kept]
    assert regression.metric is not None
    dual, written = dual_basis(x, importance[kept], regression.metric), x @ regression.weight
    for numbers, picked in groups_at_once(owners, sum(regression.weight.shape)):
        left, right = truncated(padded_rows(dual, picked).mT, padded_rows(written, picked), A.shape[-1])
        _put(A, B, numbers, left, right)


def _fit_lookups(
    regression: _Regression,
    components_of_points: Int[Tensor, " points"],
    A: Float[Tensor, "C d m"],
    B: Float[Tensor, "C m d_out"],
) -> None:
    """Component g gets the rows that only its data points look up, component 0 those that several do."""
    looked_up, numbers = regression.x.unique(return_inverse=True)
    of_rows = components_of_points[regression.own.points]
    least, largest = (
        torch.zeros_like(looked_up).scatter_reduce(0, numbers, of_rows, how, include_self=False)
        for how in ("amin", "amax")
    )
    for some, picked in groups_at_once(torch.where(least == largest, least, 0), sum(regression.weight.shape)):
        written = padded_rows(regression.weight[looked_up], picked)
        eye = torch.eye(picked.shape[1], dtype=written.dtype, device=written.device).expand(len(some), -1, -1)
        of_picked, right = truncated(eye, written, A.shape[-1])
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
