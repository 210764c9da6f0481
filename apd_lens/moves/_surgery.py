"""Operations on components that keep their sum: split, settle, refactor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from apd_lens._shards import like
from apd_lens.components._components import ParameterComponents
from apd_lens.components._products import masked_product
from apd_lens.data._points import Valid, padded, zero_at_padding
from apd_lens.host._matrix import Use
from apd_lens.passes._watch import Call

# Of a clean split, in which each part does all for its data points, the shares done add up to 2; of one direction that
# is cut in two they add up to 1.
_MIN_SEPARATION = 1.2
# Of a data point's mean square.
_RIDGE = 1e-3


@dataclass(frozen=True)
class Split:
    """One move: component `old` gives what it does on the marked data points to `new`.

    Attributes:
        given, kept: of all data points, those that go to the new component and those that stay.
    """

    old: int
    new: int
    given: Bool[Tensor, " data"]
    kept: Bool[Tensor, " data"]


def settle(
    components: ParameterComponents,
    optimizer: torch.optim.Optimizer,
    touched: list[int],
    noise: float,
    generator: torch.Generator,
) -> None:
    """After moves: the touched components' moments start from zero, and noise lets their spare rank grow."""
    if not touched:
        return
    for factor in components.factors_of_all:
        _forget_moments(optimizer.state.get(factor, {}), touched)
        drawn = torch.randn(len(touched), *factor.shape[1:], generator=generator, dtype=factor.dtype, device="cpu")
        factor[touched] += noise * drawn.to(factor.device)
    for parameter in () if components.gates is None else components.gates.of_components:
        _forget_moments(optimizer.state.get(parameter, {}), touched)


def inputs_of_data_points(
    components: ParameterComponents,
    like: Float[Tensor, "batch *pos C"] | Bool[Tensor, "batch *pos C"],
    valid: Valid,
    calls: Sequence[Call],
) -> list[tuple[Use, Tensor]]:
    """Of every matrix its first use, and x there `data *pos d_in` (or rows `data *pos`).

    Args:
        like: attributions or a mask, which have the data points' axes.
    """
    inputs = []
    for name in components.names:
        use, x = _inputs_of(name, calls)
        inputs.append((use, of_data_points(x, like, valid)))
    return inputs


def of_data_points(values: Shaped[Tensor, "batch ..."], like: Tensor, valid: Valid) -> Shaped[Tensor, "data ..."]:
    """The values of each data point, padding left out: where data points are positions, of that position; where they
    are examples, with zeros at padding. `like` as in `inputs_of_data_points`."""
    if (is_data := padded(like, valid)) is not None:
        return values[is_data.to(values.device)]
    return zero_at_padding(values, valid).flatten(0, like.ndim - 2)


def split_component(
    components: ParameterComponents,
    split: Split,
    inputs: Sequence[tuple[Use, Tensor]],
    ridge: float = _RIDGE,
    separation: float = _MIN_SEPARATION,
) -> bool:
    """Makes one split, unless it would cut through what is one thing.

    In every matrix the new component gets, on top of what it had, the part of P_old that acts on the given data points
    and not on the kept ones (`part_for`); the old one keeps the rest, so the sum stays. Both are refactored by SVD.

    Args:
        inputs: of every matrix a use, and its x `data *pos d_in` (or rows `data *pos`).
        ridge: see `part_for`.
        separation: how clean it must be in one matrix at least: the shares of what the whole component did that the two
            parts do for their data points, added up. 2 where nothing is lost.
    """
    if not split.given.any() or not split.kept.any():
        return False
    parts, separations = [], []
    for use, x in inputs:
        A, B = components.factors(use)
        whole, given, kept = A[split.old], x[split.given.to(x.device)], x[split.kept.to(x.device)]
        part = part_for(whole, given, kept, ridge)
        done = _share_done(part, whole, B[split.old], given)
        left = _share_done(whole - part, whole, B[split.old], kept)
        parts.append(part)
        separations.append(done + left)
    if max(separations) < separation:
        return False
    for part, (use, _) in zip(parts, inputs, strict=True):
        A, B = components.factors(use)
        rest = A[split.old] - part
        refactor(A, B, split.new, torch.cat([part, A[split.new]], 1), torch.cat([B[split.old], B[split.new]]))
        refactor(A, B, split.old, rest, B[split.old])
    if components.gates is not None:
        components.gates.copy_to(split.new, split.old)
    return True


def part_for(
    A: Float[Tensor, "d_in m"],
    given: Float[Tensor, "given *pos d_in"] | Int[Tensor, "given *pos"],
    kept: Float[Tensor, "kept *pos d_in"] | Int[Tensor, "kept *pos"],
    ridge: float = _RIDGE,
) -> Float[Tensor, "d_in m"]:
    """Π A with the Π that comes nearest to x Π = x on given inputs and x Π = 0 on kept ones, by ridge regression.

    Π = (XᵀX + λ)⁻¹ Xᵀ D X, X all inputs, D = 1 for given and 0 for kept. For lookups, X one-hot.

    Args:
        ridge: λ, as a share of a data point's mean square. Much less than the data points of one mechanism have in
            common, and more than what only one of them has, if that is not to decide where it goes.
    """
    if not given.is_floating_point():
        n_given, n_kept = (torch.bincount(rows.flatten(), minlength=len(A)).to(A.dtype) for rows in (given, kept))
        return (n_given / (n_given + n_kept).clamp_min(1))[:, None] * A
    given, kept = given.flatten(0, -2).to(A.dtype), kept.flatten(0, -2).to(A.dtype)
    X = torch.cat([given, kept])
    wanted = torch.cat([given @ A, torch.zeros_like(kept @ A)])  # D X A
    n_points = X.any(1).sum().clamp_min(1)  # padding is zero
    added = ridge * X.square().sum() / n_points + torch.finfo(A.dtype).tiny
    if len(X) < X.shape[1]:  # (XᵀX + λ)⁻¹ Xᵀ = Xᵀ (XXᵀ + λ)⁻¹
        return X.mT @ torch.linalg.solve(X @ X.mT + added * torch.eye(len(X), dtype=X.dtype, device=X.device), wanted)
    return torch.linalg.solve(X.mT @ X + added * torch.eye(X.shape[1], dtype=X.dtype, device=X.device), X.mT @ wanted)


def _share_done(part: Tensor, whole: Tensor, B: Tensor, x: Tensor) -> float:
    """‖x part B‖ / ‖x whole B‖ over inputs x."""
    done = masked_product(x, part[None], B[None]).norm()
    return (done / masked_product(x, whole[None], B[None]).norm().clamp_min(torch.finfo(B.dtype).tiny)).item()


def _inputs_of(name: str, calls: Sequence[Call]) -> tuple[Use, Tensor]:
    """The first use of a matrix, and its inputs; where the host multiplies head by head, the heads side by side."""
    first = next(call.use for call in calls if call.use.matrix == name)
    whole = replace(first, rows=slice(None), columns=slice(None), scale=1.0)  # factors that can be written to
    if first.rows == slice(None):
        return whole, next(call.x for call in calls if call.use == first)
    return whole, torch.cat([call.x for call in calls if call.use.site == first.site], dim=-1)


def refactor(
    A: Tensor, B: Tensor, component: int, left: Float[Tensor, "d_in r"], right: Float[Tensor, "r d_out"]
) -> None:
    """Writes the best rank-m approximation of left @ right into the component's factors, evenly balanced.

    By QR of both sides, so that only an r × r matrix is decomposed.
    """
    Q_left, R_left = torch.linalg.qr(left)
    Q_right, R_right = torch.linalg.qr(right.mT)
    U, singular_values, Vh = torch.linalg.svd(R_left @ R_right.mT, full_matrices=False)
    m = min(A.shape[-1], len(singular_values))
    root = singular_values[:m].sqrt()
    A[component], B[component] = 0.0, 0.0
    columns, rows = Q_left @ U[:, :m] * root, root[:, None] * (Vh[:m] @ Q_right.mT)
    # Singular vectors have either sign. Rounding, which is another one in several processes, is not to choose it.
    numbers = torch.arange(len(columns), dtype=columns.dtype, device=columns.device)
    signs = torch.where(numbers.cos() @ columns < 0, -1.0, 1.0).to(columns)
    A[component, :, :m], B[component, :m] = columns * signs, signs[:, None] * rows


def _forget_moments(state: Mapping[str, Any], touched: list[int]) -> None:
    for value in state.values():
        if isinstance(value, Tensor) and value.ndim > 0:
            forgotten = torch.zeros(len(value), *[1] * (value.ndim - 1), dtype=torch.bool, device=value.device)
            forgotten[touched] = True
            value.masked_fill_(like(forgotten, value), 0.0)
