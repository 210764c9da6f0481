"""What taking components out does, on target and elsewhere, beside other edits of the same rank.

The edits that know no components are made of what each matrix reads, C = mean of x xᵀ over the data points of the
on-target data and of the other data. Both take as many directions out of a matrix as the components' sum has there:

- singular directions: those of W = Σ σ_i u_i v_iᵀ that respond more on target than elsewhere, by σ_i² u_iᵀ (C_on −
  C_other) u_i. This is what a plain SVD of the weights offers.
- whitened inputs: Δ = Π W, where Π takes out the r directions of x in which the on-target data is largest, measured
  in units of the other data: C_other^(-1/2) C_on C_other^(-1/2) = Q Λ Qᵀ, Π = C_other^(-1/2) Q_r Q_rᵀ C_other^(1/2).
  Of all edits of rank r this takes most of x W away on target for the least change of y elsewhere, and for one input it
  is the rank-one edit of Meng et al. 2022 ("Locating and editing factual associations in GPT") towards y = 0. In all
  matrices together, and in each one alone. It is made from the very data that it is judged on, and a component is not.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import cast

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from apd_lens._block import no_grad
from apd_lens._checks import checked
from apd_lens._errors import InvalidSetting
from apd_lens._table import Printed, table
from apd_lens.attribution._metric import metric_scalars
from apd_lens.components._components import ParameterComponents
from apd_lens.components._factors import sum_of_components
from apd_lens.components._measures import random_components, singular_values
from apd_lens.data._batch import Batch
from apd_lens.data._inputs import Inputs
from apd_lens.data._points import Valid, one_row, without_padding
from apd_lens.data._stream import one_pass
from apd_lens.decomposition._decomposition import Chosen, Decomposition, check_fits, indices_of, output_with, ready
from apd_lens.host._matrix import Use
from apd_lens.host._target import evaluating
from apd_lens.losses._outputs import Distance, distance_of_each
from apd_lens.passes._replace import Mixture
from apd_lens.passes._watch import check_finite_output, replaced_pass

# Added to C_other's diagonal, as a share of its mean.
_RIDGE = 1e-4


@dataclass(frozen=True, eq=False, repr=False)
class EditEffects(Printed):
    """What each of several edits does. `print` shows the mean over edits of one kind.

    Attributes:
        kind: of each edit: "components", "singular directions", "whitened inputs", the same "in" a matrix alone,
            "random components" or "other components".
        edit: which one it is: the components' numbers, the seed of random ones, or "".
        norm: ‖Δ‖ / ‖W‖ over all decomposed matrices.
        on_target, other: distance from the target's output at each data point of the on-target and the other data.
        metric, metric_other: the user's metric, mean over examples; None where none was given.
        metric_before, metric_other_before: the same of the model as it is.
    """

    kind: list[str]
    edit: list[str]
    norm: Float[Tensor, " edits"]
    on_target: Float[Tensor, "edits on_target_data"]
    other: Float[Tensor, "edits other_data"]
    metric: Float[Tensor, " edits"] | None
    metric_other: Float[Tensor, " edits"] | None
    metric_before: float | None
    metric_other_before: float | None

    def table(self) -> pd.DataFrame:
        """A row for each edit: distances on target (mean) and on the other data (mean, 99th percentile, largest)."""
        columns: dict[str, list[str] | list[float]] = {"kind": self.kind, "edit": self.edit, "norm": self.norm.tolist()}
        for name, after, before in (
            ("metric", self.metric, self.metric_before),
            ("metric, other data", self.metric_other, self.metric_other_before),
        ):
            if after is not None and before is not None:
                columns[name] = after.tolist()
                columns[f"{name}, before"] = [before] * len(self.kind)
        columns["on target"] = self.on_target.mean(1).tolist()
        columns["other, mean"] = self.other.mean(1).tolist()
        columns["other, 99th percentile"] = percentile(self.other, 0.99).tolist()
        columns["other, largest"] = self.other.amax(1).tolist()
        return pd.DataFrame(columns)

    def _parts(self) -> list[str]:
        columns = self.table().drop(columns=["kind", "edit"])
        rows = []
        for kind in dict.fromkeys(self.kind):
            means = columns[[other == kind for other in self.kind]].mean()
            rows.append([kind, *(f"{mean:.4g}" for mean in means)])
        return [table(["out of the weights", *columns.columns], rows)]


def percentile(values: Float[Tensor, "edits data"], share: float) -> Float[Tensor, " edits"]:
    """The smallest value of each row that at least this share of its values do not exceed.

    >>> percentile(torch.arange(1.0, 201.0)[None], 0.99)
    tensor([198.])
    """
    return values.kthvalue(math.ceil(share * values.shape[1]), dim=1).values


@checked
@no_grad()
def edit_effects(
    decomposition: Decomposition,
    ablate: Chosen,
    on_target: Iterable[Batch],
    other: Iterable[Batch],
    *,
    metric: Callable[[Tensor], Tensor] | None = None,
    distance: Distance | None = None,
    n_random: int = 5,
    n_other: int = 5,
    others: Iterable[int] | Int[Tensor, " others"] | None = None,
    seed: int = 0,
) -> EditEffects:
    """Measures what taking components out does on target data and on other data, beside other edits.

    The other edits: of the same rank in each matrix by SVD (see the head of this file), random components with the same
    norms and singular values, and as many other trained components.

    Args:
        ablate: the components to take out, together.
        on_target, other: batches, both iterated twice, so give lists or DataLoaders. One number is kept for each data
            point and edit.
        metric: the explained output -> one scalar an example, such as the log-probability of an answer. It is applied
            to the other data too.
        distance: as in `apd_lens.Losses`; default that of the decomposition.
        n_random: number of draws of random components.
        n_other: number of draws of other trained components, none twice in a draw.
        others: the components to draw them from, such as those that are active on other data; default all.
        seed: of the draws.

    Raises:
        InvalidSetting: no components, or fewer others than are taken out; a loaded decomposition that lacks its output.
        InvalidBatches: no batches, or what can be gone through only once.
        NonFinite: a batch, or the target's output, holds NaN or infinity.
        AlreadyActive: the model is edited, or inside a context.
    """
    chosen = indices_of(ablate, decomposition.components)
    if not chosen:
        raise InvalidSetting("edit_effects needs components to take out, got none.")
    check_fits(decomposition)
    edits = [
        _Edit("components", _named(chosen), decomposition.components, chosen),
        *_edits_by_svd(decomposition, chosen, on_target, other),
        *_random_edits(decomposition.components, chosen, n_random, seed),
        *_other_edits(decomposition.components, chosen, n_other, others, seed),
    ]
    distance = decomposition.settings.losses.distance if distance is None else distance
    on = _measured(decomposition, edits, on_target, metric, distance)
    off = _measured(decomposition, edits, other, metric, distance)
    return EditEffects(
        kind=[edit.kind for edit in edits],
        edit=[edit.name for edit in edits],
        norm=torch.tensor([_norm(decomposition, edit) for edit in edits], dtype=torch.float32, device="cpu"),
        on_target=on.distances,
        other=off.distances,
        metric=on.metric,
        metric_other=off.metric,
        metric_before=on.metric_before,
        metric_other_before=off.metric_before,
    )


@dataclass(frozen=True, eq=False)
class _Edit:
    """W − Σ P_c of the chosen components, which need not be those of the decomposition."""

    kind: str
    name: str
    components: ParameterComponents
    chosen: list[int]


@dataclass(frozen=True, eq=False)
class _Measured:
    distances: Float[Tensor, "edits data"]
    metric: Float[Tensor, " edits"] | None
    metric_before: float | None


def _measured(
    decomposition: Decomposition,
    edits: list[_Edit],
    batches: Iterable[Batch],
    metric: Callable[[Tensor], Tensor] | None,
    distance: Distance,
) -> _Measured:
    """One pass over the batches, with a forward of the target and one of every edit for each."""
    parts: list[Tensor] = []
    before: list[Tensor] = []
    after: list[Tensor] = []
    for batch in one_pass(batches):
        inputs, _ = ready(decomposition, batch, "edit_effects")
        run = partial(_run, decomposition, inputs)
        full, valid = run(None), inputs.valid
        check_finite_output(full, "edit_effects")
        outputs = (run(edit) for edit in edits)
        distances, metrics = [], []
        for output in outputs:
            distances.append(one_row(distance_of_each(full, output, distance), valid).cpu())
            if metric is not None:
                metrics.append(metric_scalars(metric, output).float().cpu())
        parts.append(torch.stack(distances))
        if metric is not None:
            before.append(metric_scalars(metric, full).float().cpu())
            after.append(torch.stack(metrics))
    return _Measured(
        distances=torch.cat(parts, 1),
        metric=torch.cat(after, 1).mean(1) if after else None,
        metric_before=torch.cat(before).mean().item() if before else None,
    )


def _run(decomposition: Decomposition, inputs: Inputs, edit: _Edit | None) -> Tensor:
    """The explained output of the edited model, in float32 or better; with None that of the target."""
    components, chosen = (decomposition.components, []) if edit is None else (edit.components, edit.chosen)
    output = output_with(decomposition, inputs, Mixture(components.picked(chosen), on=0.0, rest=1.0))
    return output.to(torch.promote_types(output.dtype, torch.float32))


def _named(chosen: list[int]) -> str:
    return ", ".join(map(str, chosen))


def _norm(decomposition: Decomposition, edit: _Edit) -> float:
    deltas = [
        sum_of_components(edit.components.A[name][edit.chosen], edit.components.B[name][edit.chosen]).norm()
        for name in edit.components.names
    ]
    weights = [decomposition.target.weights[name].value().norm().float() for name in decomposition.components.names]
    return (torch.stack(deltas).norm() / torch.stack(weights).norm()).item()


def _random_edits(components: ParameterComponents, chosen: list[int], n: int, seed: int) -> Iterator[_Edit]:
    for draw in range(n):
        twins = random_components(components.picked(chosen), seed * 1_000_003 + draw)
        yield _Edit("random components", f"draw {draw}", twins, list(range(len(chosen))))


def _other_edits(
    components: ParameterComponents, chosen: list[int], n: int, others: Iterable[int] | Tensor | None, seed: int
) -> Iterator[_Edit]:
    pool = range(components.n_components) if others is None else indices_of(others, components)
    left = torch.tensor([component for component in pool if component not in chosen], device="cpu")
    if n and len(left) < len(chosen):
        raise InvalidSetting(
            f"{len(chosen)} components are taken out, and there are {len(left)} others to compare with. Give more "
            "others, or n_other=0."
        )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        drawn = left[torch.randperm(len(left), generator=generator, device="cpu")[: len(chosen)]].tolist()
        yield _Edit("other components", _named(drawn), components, drawn)


def _edits_by_svd(
    decomposition: Decomposition, chosen: list[int], on_target: Iterable[Batch], other: Iterable[Batch]
) -> list[_Edit]:
    """The edits of the same rank that know no components."""
    components, target = decomposition.components, decomposition.target
    read_on, read_other = _second_moments(decomposition, on_target), _second_moments(decomposition, other)
    plain: dict[str, tuple[Tensor, Tensor]] = {}
    whitened: dict[str, tuple[Tensor, Tensor]] = {}
    for name in components.names:
        weight = target.weights[name].value()
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        rank = _rank(components, name, chosen)
        if rank == 0:
            plain[name] = whitened[name] = weight.new_zeros(len(weight), 1), weight.new_zeros(1, weight.shape[1])
            continue
        plain[name] = singular_directions(weight, read_on[name], read_other[name], rank)
        whitened[name] = whitened_inputs(weight, read_on[name], read_other[name], rank)
    edits = [_of_factors("singular directions", plain), _of_factors("whitened inputs", whitened)]
    if len(whitened) > 1:
        edits += [_of_factors(f"whitened inputs in {name}", {name: factors}) for name, factors in whitened.items()]
    return edits


def _of_factors(kind: str, factors: dict[str, tuple[Tensor, Tensor]]) -> _Edit:
    A, B = ({name: pair[side][None] for name, pair in factors.items()} for side in (0, 1))
    return _Edit(kind, "", ParameterComponents(A, B), [0])


def _rank(components: ParameterComponents, name: str, chosen: list[int]) -> int:
    """That of Σ P_c of the chosen; a singular value counts above a hundredth of any component's largest."""
    A, B = (factor[name][chosen] for factor in (components.A, components.B))
    joined = ParameterComponents({name: A.movedim(0, 1).flatten(1)[None]}, {name: B.flatten(0, 1)[None]})
    return int((singular_values(joined, name) > 0.01 * singular_values(components, name).max()).sum())


def singular_directions(
    weight: Float[Tensor, "d_in d_out"], on: Float[Tensor, "*d_in"], other: Float[Tensor, "*d_in"], rank: int
) -> tuple[Float[Tensor, "d_in rank"], Float[Tensor, "rank d_out"]]:
    """The factors of Σ σ_i u_i v_iᵀ over the directions that respond more on target; see the head of this file.

    Args:
        on, other: C, `d_in d_in`, or its diagonal, `d_in`.
    """
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    excess = S.square() * ((_times(on, U) - _times(other, U)) * U).sum(0)
    best = excess.topk(min(rank, len(S))).indices
    return U[:, best] * S[best], Vh[best]


def whitened_inputs(
    weight: Float[Tensor, "d_in d_out"], on: Float[Tensor, "*d_in"], other: Float[Tensor, "*d_in"], rank: int
) -> tuple[Float[Tensor, "d_in rank"], Float[Tensor, "rank d_out"]]:
    """The factors of Π W; see the head of this file. Arguments as of `singular_directions`."""
    rank = min(rank, *weight.shape)
    if other.ndim == 1:  # the directions are single rows
        ridge = _RIDGE * other.mean()
        best = (on / (other + ridge).clamp_min(torch.finfo(other.dtype).tiny)).topk(rank).indices
        return F.one_hot(best, len(weight)).to(weight).mT, weight[best]
    values, vectors = cast(tuple[Tensor, Tensor], torch.linalg.eigh(other.double()))
    values = values.clamp_min(0) + (_RIDGE * values.mean()).clamp_min(torch.finfo(values.dtype).tiny)
    root, inverse_root = (vectors * power @ vectors.mT for power in (values.sqrt(), values.rsqrt()))
    _, Q = cast(tuple[Tensor, Tensor], torch.linalg.eigh(inverse_root @ on.double() @ inverse_root))
    Q = Q[:, len(Q) - rank :]
    return (inverse_root @ Q).to(weight), (Q.mT @ root @ weight.double()).to(weight)


def _times(moment: Float[Tensor, "*d_in"], U: Float[Tensor, "d_in n"]) -> Float[Tensor, "d_in n"]:
    moment = moment.to(U)
    return moment[:, None] * U if moment.ndim == 1 else moment @ U


def _second_moments(decomposition: Decomposition, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Name -> C, mean over data points of x xᵀ, or its diagonal for a lookup; of transposed uses nothing is counted,
    unless a matrix has no others."""
    target, names = decomposition.target, decomposition.components.names
    weights = {name: target.weights[name] for name in names}
    turned = {name: all(use.transposed for use in weights[name].uses) for name in names}
    sums: dict[str, Tensor] = {}
    n_rows = dict.fromkeys(names, 0)
    for batch in one_pass(batches):
        inputs, output = ready(decomposition, batch, "edit_effects")

        def keep(
            use: Use, x: Tensor, original: Callable[[], Tensor], bias: Tensor | None, valid: Valid = inputs.valid
        ) -> Tensor:
            if use.transposed == turned[use.matrix]:
                added, n = _squares(use, x, len(weights[use.matrix].value()), valid)
                sums[use.matrix] = sums[use.matrix] + added if use.matrix in sums else added
                n_rows[use.matrix] += n
            return original()

        with evaluating(target.model):
            replaced_pass(target, names, keep, inputs, output)
    return {name: total / max(n_rows[name], 1) for name, total in sums.items()}


def _squares(use: Use, x: Tensor, d_in: int, valid: Valid) -> tuple[Tensor, int]:
    """Σ x xᵀ over data points, in the place in the matrix that the use multiplies by; and their number."""
    if not x.is_floating_point():
        rows = x[valid] if valid is not None and valid.shape == x.shape else x
        return rows.flatten().bincount(minlength=d_in).double(), rows.numel()
    rows = without_padding(x, valid).flatten(0, -2)
    if use.rows == slice(None):
        return (rows.mT.float() @ rows.float()).double(), len(rows)
    whole = rows.new_zeros(len(rows), d_in, dtype=torch.float32)
    whole[:, use.rows] = rows.float()
    return (whole.mT @ whole).double(), len(whole)
