"""Products of active (data point, component) pairs only, by the cheapest of several ways."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apd_lens.components._factors import Mask, MatrixInput
from apd_lens.data._finite import on_gpu

# What the parts of a masked product cost, forward and backward, in multiply-adds of a dense one: chosen with what
# benchmarks/sparse_product.py measures on a CPU. Constants, so that the same run takes the same way every time.
_PER_WEIGHT = 15  # a number in the factors that a grouped or padded product reads, and has a gradient for
_PER_GATHERED = 50  # a number of x and y, for each active pair
_PER_GROUP = 700_000  # a component
_PER_PADDED = 40  # a number of x and y in the groups, filled up to one length
_PER_GATHERED_ROW = 70  # a number of x, y and the factors, for each active pair, where rank is one


@dataclass(frozen=True, eq=False)
class ActivePairs:
    """The active (data point, component) pairs of a mask, sorted by component.

    Attributes:
        data_points: of every pair; the mask's examples, or positions of examples, in one row.
        components: of every pair.
        ends: for each component, where its pairs end.
        most: number of pairs of the component that has the most; None on a GPU, which would have to be waited for.
    """

    data_points: Int[Tensor, " pairs"]
    components: Int[Tensor, " pairs"]
    ends: Int[Tensor, " C"]
    most: int | None

    def to(self, device: torch.device) -> "ActivePairs":
        """The same pairs on the device of a matrix."""
        if self.ends.device == device:
            return self
        return ActivePairs(self.data_points.to(device), self.components.to(device), self.ends.to(device), self.most)

    @cached_property
    def places(self) -> Int[Tensor, " pairs"]:
        """Of every pair, among the groups filled up to one length, `most` (or 1)."""
        assert self.most is not None
        device = self.components.device
        starts = F.pad(self.ends, (1, 0))[:-1]
        shifts = torch.arange(len(self.ends), device=device) * max(1, self.most) - starts
        return torch.arange(len(self.components), device=device) + shifts[self.components]


def active_pairs(mask: Bool[Tensor, "examples *mask_pos C"], n_active: int | None = None) -> ActivePairs:
    """The pairs where the mask is True.

    Args:
        n_active: how many there are, if that is known. Then nothing has to be fetched from the device.
    """
    by_component = mask.flatten(0, -2).mT
    found = by_component.nonzero() if n_active is None else torch.nonzero_static(by_component, size=n_active)
    numbers = by_component.sum(1)
    most = None if on_gpu(mask.device) else int(numbers.max())
    return ActivePairs(found[:, 1], found[:, 0], numbers.cumsum(0).int(), most)


def cheapest_way(
    n_rows: int, A: Float[Tensor, "C d_in m"], B: Float[Tensor, "C m d_out"], mask: Mask, active: ActivePairs
) -> Literal["dense", "padded", "grouped", "gathered"]:
    """How to compute a masked product of `n_rows` rows of x, by what it is estimated to cost.

    dense: all components, then the mask. grouped: the rows of each component's data points together, one product a
    component. padded: the same with all groups filled up to one length, as one batched product. gathered (rank one
    only): each pair's column of A and row of B are fetched, and there is no product.
    """
    n_components, d_in, m = A.shape
    width = d_in + B.shape[-1]
    rows_per_pair = n_rows / mask[..., 0].numel()
    n_pair_rows, n_weights = len(active.components) * rows_per_pair, n_components * m * width
    costs = {
        "dense": n_rows * n_weights,
        "grouped": n_weights * _PER_WEIGHT + n_components * _PER_GROUP + n_pair_rows * width * (_PER_GATHERED + m),
    }
    if active.most is not None:
        n_padded_rows = n_components * active.most * rows_per_pair
        costs["padded"] = n_weights * _PER_WEIGHT + n_padded_rows * width * (_PER_PADDED + m)
    if m == 1:
        costs["gathered"] = n_pair_rows * width * _PER_GATHERED_ROW
    return min(costs, key=lambda way: costs[way])  # type: ignore[return-value]


def pairwise_product(
    x: MatrixInput,
    A: Float[Tensor, "C d_in m"],
    B: Float[Tensor, "C m d_out"],
    mask: Mask,
    active: ActivePairs,
    way: Literal["padded", "grouped", "gathered"],
) -> Float[Tensor, "examples *pos d_out"]:
    """Σ x A_c B_c over the active pairs alone: gather rows of x, multiply, add up what belongs to one data point."""
    autocast = torch.is_autocast_enabled(A.device.type)
    dtype = torch.get_autocast_dtype(A.device.type) if autocast else A.dtype
    A, B = A.to(dtype), B.to(dtype)
    data_axes = mask.shape[:-1]
    rows = (
        x.expand(*data_axes, *x.shape[len(data_axes) :])
        .flatten(0, len(data_axes) - 1)
        .index_select(0, active.data_points)
    )
    factors = [A, B]
    if x.is_floating_point():
        rows = rows.to(dtype)
    else:
        rows, factors = _looked_up(rows, A, active), [B]
    if way == "gathered":
        y = _of_each_pair(rows, factors, active)
    elif way == "padded":
        y = _of_padded_groups(rows, factors, active)
    else:
        y = _of_each_group(rows, factors, active)
    total = y.new_zeros(data_axes.numel(), *y.shape[1:], dtype=torch.promote_types(dtype, torch.float32))
    return total.index_add(0, active.data_points, y.to(total.dtype)).to(dtype).unflatten(0, data_axes)


def _looked_up(
    rows: Int[Tensor, "pairs *pos"], A: Float[Tensor, "C d_in m"], active: ActivePairs
) -> Float[Tensor, "pairs *pos m"]:
    """Rows of each pair's A, which need not be in one piece."""
    n_components, d_in, m = A.shape
    columns = torch.arange(n_components * m, device=A.device).view(-1, m)[active.components]
    columns = columns.reshape(-1, *[1] * (rows.ndim - 1), m)
    return F.embedding(columns * d_in + rows[..., None], A.mT.reshape(-1, 1))[..., 0]


def _of_each_pair(
    rows: Float[Tensor, "pairs *pos d_in"], factors: Sequence[Float[Tensor, "C _ _"]], active: ActivePairs
) -> Float[Tensor, "pairs *pos d_out"]:
    """Each pair's rows times the factors of its component, whose rank is one; each is fetched, and there is no
    product."""
    component = active.components.reshape(-1, *[1] * (rows.ndim - 2))
    *read, written = factors
    for A in read:
        rows = (rows * F.embedding(component, A[..., 0])).sum(-1, keepdim=True)
    return rows * F.embedding(component, written[:, 0])


def _of_padded_groups(
    rows: Float[Tensor, "pairs *pos d_in"], factors: Sequence[Float[Tensor, "C _ _"]], active: ActivePairs
) -> Float[Tensor, "pairs *pos d_out"]:
    """Each pair's rows times the factors of its component; the groups, filled up to one length, as one batch."""
    assert active.most is not None
    n_components = len(active.ends)
    padded = rows.new_zeros(n_components * max(1, active.most), *rows.shape[1:])
    groups = padded.index_copy(0, active.places, rows).view(n_components, -1, rows.shape[-1])
    for factor in factors:
        # Either way gradients come out in the layout of the factor.
        groups = (factor.mT @ groups.mT).mT if factor.mT.is_contiguous() else groups @ factor
    return groups.reshape(*padded.shape[:-1], -1).index_select(0, active.places)


def _of_each_group(
    rows: Float[Tensor, "pairs *pos d_in"], factors: Sequence[Float[Tensor, "C _ _"]], active: ActivePairs
) -> Float[Tensor, "pairs *pos d_out"]:
    """Each pair's rows times the factors of its component, group by group."""
    flat = rows.flatten(0, -2)
    ends = active.ends * (len(flat) // len(rows) if len(rows) else 1)
    for factor in factors:
        flat = _GroupedProduct.apply(flat, factor, ends)
    return flat.unflatten(0, rows.shape[:-1])


class _GroupedProduct(torch.autograd.Function):
    """Rows in groups, one after the other and each ending where `ends` says, times a factor for each group."""

    @staticmethod
    def forward(
        rows: Float[Tensor, "rows d_in"], factor: Float[Tensor, "C d_in d_out"], ends: Int[Tensor, " C"]
    ) -> Float[Tensor, "rows d_out"]:
        return _rows_by_factors(rows, factor, ends)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, factor, ends = ctx.saved_tensors
        needs_rows, needs_factor, _ = ctx.needs_input_grad
        for_rows = _rows_by_factors(gradient, factor.mT, ends) if needs_rows else None
        for_factor = None
        if needs_factor and factor.mT.is_contiguous():  # the gradient in the same layout
            for_factor = _rows_by_rows(gradient, rows, ends).mT.detach()
        elif needs_factor:
            for_factor = _rows_by_rows(rows, gradient, ends)
        return for_rows, for_factor, None


def _rows_by_factors(rows: Tensor, factor: Tensor, ends: Tensor) -> Float[Tensor, "rows d_out"]:
    if _has_grouped_kernel(rows):
        return F.grouped_mm(_with_even_strides(rows), _with_even_strides(factor), offs=ends)
    y = rows.new_empty(len(rows), factor.shape[-1])
    for group, some in _groups(ends):
        if some.start < some.stop:
            torch.mm(rows[some], factor[group], out=y[some])
    return y


def _rows_by_rows(rows: Tensor, others: Tensor, ends: Tensor) -> Float[Tensor, "C d_in d_out"]:
    """Within each group, rowsᵀ times others."""
    if _has_grouped_kernel(rows):
        return F.grouped_mm(_with_even_strides(rows).mT, _with_even_strides(others), offs=ends)
    products = rows.new_empty(len(ends), rows.shape[1], others.shape[1])
    for group, some in _groups(ends):
        torch.mm(rows[some].mT, others[some], out=products[group])  # zero for a group of no rows
    return products


def _has_grouped_kernel(rows: Tensor) -> bool:
    """On a CPU grouped_mm (torch 2.13) is itself a loop over groups, a slower one than ours, and not for float64."""
    return on_gpu(rows.device)


def _groups(ends: Int[Tensor, " C"]) -> Iterator[tuple[int, slice]]:
    """Every group, and where its rows are."""
    start = 0
    for group, end in enumerate(ends.tolist()):
        yield group, slice(start, end)
        start = end


def _with_even_strides(values: Float[Tensor, "... columns"]) -> Float[Tensor, "... columns"]:
    """The same values, with rows (or, of a transposed tensor, columns) that start at multiples of 16 bytes in memory:
    grouped_mm wants that."""
    if values.stride(-2) == 1 and values.stride(-1) != 1:
        return _with_even_strides(values.mT).mT
    columns, multiple = values.shape[-1], 16 // values.element_size()
    if columns % multiple:
        return F.pad(values, (0, -columns % multiple))[..., :columns]
    # The stride of an axis of length 1 can be anything, and grouped_mm looks at it all the same.
    return values if values.stride()[-2:] == (columns, 1) else values.clone(memory_format=torch.contiguous_format)
