"""Products of active (data point, component) pairs only, by the cheapest of several ways."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apd_lens.components._factors import Mask, MatrixInput
from apd_lens.data._finite import on_gpu

# What the parts of a masked product cost, forward and backward, in multiply-adds of a dense one: chosen with what
# benchmarks/sparse_product.py measures on a CPU. Constants, so that the same run takes the same way every time.
_PER_WEIGHT = 15  # a number in the factors that a grouped product reads, and has a gradient for
_PER_GATHERED = 50  # a number of x and y, for each active pair
_PER_GROUP = 700_000  # a component
_PER_SPARSE = 5  # a number of the factors, for each active pair
_PER_SPARSE_ON_GPU = 70  # that on a GPU, where it is fetched before it is multiplied; not measured
_PER_CALL = 3_000_000  # a sparse product


@dataclass(frozen=True, eq=False)
class Links:
    """Which parts each row is linked with, as a sparse matrix `rows parts`, and as its transpose.

    Attributes:
        parts: of every link, sorted by row.
        row_starts: where the links of each row begin; and the number of links.
        rows: of every link, sorted by part.
        part_starts: where those of each part begin; and the number of links.
        order: the links sorted by part, among those sorted by row.
    """

    parts: Int[Tensor, " links"]
    row_starts: Int[Tensor, " rows_and_1"]
    rows: Int[Tensor, " links"]
    part_starts: Int[Tensor, " parts_and_1"]
    order: Int[Tensor, " links"]


@dataclass(frozen=True, eq=False)
class ActivePairs:
    """The active (data point, component) pairs of a mask, sorted by data point.

    Attributes:
        data_points: of every pair; the mask's examples, or positions of examples, in one row.
        components: of every pair.
        of_data: for each data point, how many pairs it has.
        of_components: for each component, how many.
    """

    data_points: Int[Tensor, " pairs"]
    components: Int[Tensor, " pairs"]
    of_data: Int[Tensor, " data"]
    of_components: Int[Tensor, " C"]
    _elsewhere: dict[torch.device, "ActivePairs"] = field(default_factory=dict, init=False, repr=False)
    _repeated: dict[int, "ActivePairs"] = field(default_factory=dict, init=False, repr=False)
    _links: dict[int, Links] = field(default_factory=dict, init=False, repr=False)

    def to(self, device: torch.device) -> "ActivePairs":
        """The same pairs on the device of a matrix."""
        if self.components.device == device:
            return self
        if device not in self._elsewhere:
            pairs = (self.data_points, self.components, self.of_data, self.of_components)
            self._elsewhere[device] = ActivePairs(*(each.to(device) for each in pairs))
        return self._elsewhere[device]

    @cached_property
    def by_component(self) -> Int[Tensor, " pairs"]:
        """The pairs sorted by component, among those sorted by data point."""
        return self.components.argsort(stable=True)

    def repeated(self, n: int) -> "ActivePairs":
        """The pairs where each data point has n rows of x, of which each is a data point then."""
        if n == 1:
            return self
        if n not in self._repeated:
            order = _transposed(self.data_points, self.of_data, n)
            rows = (self.data_points[:, None] * n + torch.arange(n, device=order.device)).flatten()[order]
            components = self.components.repeat_interleave(n)[order]
            of_each = self.of_data.repeat_interleave(n), self.of_components * n
            self._repeated[n] = ActivePairs(rows, components, *of_each)
        return self._repeated[n]

    def links(self, m: int) -> Links:
        """Each data point with the m parts of rank one of each of its components."""
        if m not in self._links:
            each = torch.arange(m, device=self.components.device)
            parts = (self.components[:, None] * m + each).flatten()
            order = _transposed(self.components[self.by_component], self.of_components, m)
            order = (self.by_component[:, None] * m + each).flatten()[order]
            row_starts, part_starts = _starts(self.of_data * m), _starts(self.of_components.repeat_interleave(m))
            links = (parts, row_starts, self.data_points[order // m], part_starts, order)
            self._links[m] = Links(*(each.int() for each in links))
        return self._links[m]


def _transposed(groups: Int[Tensor, " pairs"], counts: Int[Tensor, " groups"], n: int) -> Int[Tensor, " n_pairs"]:
    """Of what is sorted by group, n times each: all of a group once, then all of it again, among each n times."""
    first = _starts(counts)[groups]
    among = torch.arange(len(groups), device=groups.device) - first
    copies = torch.arange(n, device=groups.device)
    places = (first * n + among)[:, None] + counts[groups][:, None] * copies
    numbers = torch.arange(places.numel(), device=groups.device)
    return torch.empty_like(numbers).index_copy_(0, places.flatten(), numbers)


def _starts(counts: Int[Tensor, " groups"]) -> Int[Tensor, " groups_and_1"]:
    return F.pad(counts.cumsum(0), (1, 0))


def active_pairs(mask: Bool[Tensor, "examples *mask_pos C"], n_active: int | None = None) -> ActivePairs:
    """The pairs where the mask is True.

    Args:
        n_active: how many there are, if that is known. Then nothing has to be fetched from the device.
    """
    flat = mask.flatten(0, -2)
    found = flat.nonzero() if n_active is None else torch.nonzero_static(flat, size=n_active)
    return ActivePairs(found[:, 0], found[:, 1], flat.sum(1), flat.sum(0))


def cheapest_way(
    n_rows: int, A: Float[Tensor, "C d_in m"], B: Float[Tensor, "C m d_out"], mask: Mask, active: ActivePairs
) -> Literal["dense", "grouped", "sparse"]:
    """How to compute a masked product of `n_rows` rows of x, by what it is estimated to cost.

    dense: all components, then the mask. grouped: the rows of each component's data points together, one product a
    component. sparse: x A at the active pairs only, and a sparse matrix of these times B.
    """
    n_components, d_in, m = A.shape
    width = d_in + B.shape[-1]
    n_pair_rows = len(active.components) * n_rows / mask[..., 0].numel()
    n_weights = n_components * m * width
    per_sparse = _PER_SPARSE_ON_GPU if on_gpu(A.device) else _PER_SPARSE
    costs: dict[Literal["dense", "grouped", "sparse"], float] = {
        "dense": n_rows * n_weights,
        "grouped": n_weights * _PER_WEIGHT + n_components * _PER_GROUP + n_pair_rows * width * (_PER_GATHERED + m),
        "sparse": n_pair_rows * m * width * per_sparse + _PER_CALL,
    }
    return min(costs, key=lambda way: costs[way])


def pairwise_product(
    x: MatrixInput,
    A: Float[Tensor, "C d_in m"],
    B: Float[Tensor, "C m d_out"],
    mask: Mask,
    active: ActivePairs,
    way: Literal["grouped", "sparse"],
) -> Float[Tensor, "examples *pos d_out"]:
    """Σ x A_c B_c over the active pairs alone."""
    autocast = torch.is_autocast_enabled(A.device.type)
    dtype = torch.get_autocast_dtype(A.device.type) if autocast else A.dtype
    data_axes = mask.shape[:-1]
    rows = x.expand(*data_axes, *x.shape[len(data_axes) :]).flatten(0, len(data_axes) - 1)
    with torch.autocast(A.device.type, enabled=False):
        if way == "sparse":
            y = _of_links(rows, A, B, active, torch.promote_types(dtype, torch.float32))
        else:
            y = _of_groups(rows, A.to(dtype), B.to(dtype), active)
    return y.to(dtype).unflatten(0, data_axes)


# --- sparse


def _of_links(
    rows: MatrixInput,
    A: Float[Tensor, "C d_in m"],
    B: Float[Tensor, "C m d_out"],
    active: ActivePairs,
    dtype: torch.dtype,
) -> Float[Tensor, "data *pos d_out"]:
    """Rows times the parts that they are linked with."""
    A, B = A.to(dtype), B.to(dtype)
    places = rows.shape[:-1] if rows.is_floating_point() else rows.shape
    flat, active = rows.flatten(0, len(places) - 1), active.repeated(places[1:].numel())
    links = active.links(A.shape[2])
    if rows.is_floating_point():
        w = _Partial.apply("w", None, flat.to(dtype), A.mT.flatten(0, 1), links)
    else:
        w = _looked_up(flat[active.data_points], A, active.components).flatten()
    return _Partial.apply("x", w, None, B.flatten(0, 1), links).unflatten(0, places)


class _Partial(torch.autograd.Function):
    """∂T/∂w, ∂T/∂x or ∂T/∂y of T = Σ w_rp x_r · y_p, over the links of rows r with parts p.

    Each is linear in the two others. So its gradients are partials of T too, with the gradient that comes in the place
    of what it is.
    """

    @staticmethod
    def forward(
        of: Literal["w", "x", "y"],
        w: Float[Tensor, " links"] | None,
        x: Float[Tensor, "rows d"] | None,
        y: Float[Tensor, "parts d"] | None,
        links: Links,
    ) -> Tensor:
        return _PARTIALS[of]({"w": w, "x": x, "y": y}, links)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.of, *tensors, ctx.links = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        known = dict(zip("wxy", ctx.saved_tensors, strict=True)) | {ctx.of: gradient}
        needs = zip("wxy", ctx.needs_input_grad[1:4], strict=True)
        return None, *(_PARTIALS[of](known, ctx.links) if needed else None for of, needed in needs), None


def _dots(known: Mapping[str, Any], links: Links) -> Float[Tensor, " links"]:
    """x_r · y_p of each link."""
    x, y = known["x"], known["y"]
    if not _has_sparse_kernel(x):
        rows = links.rows.new_empty(len(links.rows)).index_copy_(0, links.order.long(), links.rows)
        return (F.embedding(rows, x) * F.embedding(links.parts, y)).sum(-1)
    _hear_of_beta()
    zeros = x.new_zeros(len(links.parts))  # beta times what is there is added, and 0 times NaN is NaN
    where = torch.sparse_csr_tensor(links.row_starts, links.parts, zeros, (len(x), len(y)), check_invariants=False)
    return torch.sparse.sampled_addmm(where, x, y.mT, beta=0.0).values()


def _sums_of_rows(known: Mapping[str, Any], links: Links) -> Float[Tensor, "rows d"]:
    """Σ_p w_rp y_p of each row."""
    return _bags(links.parts, links.row_starts, known["w"], known["y"])


def _sums_of_parts(known: Mapping[str, Any], links: Links) -> Float[Tensor, "parts d"]:
    """Σ_r w_rp x_r of each part."""
    return _bags(links.rows, links.part_starts, known["w"].index_select(0, links.order), known["x"])


_PARTIALS = {"w": _dots, "x": _sums_of_rows, "y": _sums_of_parts}


def _bags(of: Tensor, starts: Tensor, weights: Tensor, values: Float[Tensor, "n d"]) -> Float[Tensor, "bags d"]:
    return F.embedding_bag(of, values, starts, mode="sum", per_sample_weights=weights, include_last_offset=True)


def _has_sparse_kernel(x: Tensor) -> bool:
    return x.device.type == "cpu"


@cache
def _hear_of_beta() -> None:
    """Torch says once in a process that sparse tensors are in beta; nobody needs to hear it of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 1], [0], [0.0], (1, 1), check_invariants=False)


def _looked_up(
    rows: Int[Tensor, "pairs *pos"], A: Float[Tensor, "C d_in m"], components: Int[Tensor, " pairs"]
) -> Float[Tensor, "pairs *pos m"]:
    """Rows of each pair's A, which need not be in one piece."""
    n_components, d_in, m = A.shape
    columns = torch.arange(n_components * m, device=A.device).view(-1, m)[components]
    columns = columns.reshape(-1, *[1] * (rows.ndim - 1), m)
    return F.embedding(columns * d_in + rows[..., None], A.mT.reshape(-1, 1))[..., 0]


# --- grouped


def _of_groups(
    rows: MatrixInput, A: Float[Tensor, "C d_in m"], B: Float[Tensor, "C m d_out"], active: ActivePairs
) -> Float[Tensor, "data *pos d_out"]:
    """Gathers rows of x by component, multiplies, and adds up what belongs to one data point."""
    data_points, components = (each[active.by_component] for each in (active.data_points, active.components))
    ends = active.of_components.cumsum(0).int()
    chosen, factors = rows.index_select(0, data_points), [A, B]
    if rows.is_floating_point():
        chosen = chosen.to(A.dtype)
    else:
        chosen, factors = _looked_up(chosen, A, components), [B]
    y = _of_each_group(chosen, factors, ends)
    total = y.new_zeros(len(rows), *y.shape[1:], dtype=torch.promote_types(y.dtype, torch.float32))
    return total.index_add(0, data_points, y.to(total.dtype))


def _of_each_group(
    rows: Float[Tensor, "pairs *pos d_in"], factors: Sequence[Float[Tensor, "C _ _"]], ends: Int[Tensor, " C"]
) -> Float[Tensor, "pairs *pos d_out"]:
    """Each pair's rows times the factors of its component, group by group."""
    flat = rows.flatten(0, -2)
    ends = ends * (len(flat) // len(rows) if len(rows) else 1)
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
