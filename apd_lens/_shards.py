"""Tensors that are divided over the processes along their first axis, as DTensors of torch; alone: the identity.

A part is gathered where the whole is used, and what was gathered is freed behind the use. Where the use has a gradient
it is gathered once more for it, into the same memory, as torch's FSDP2 does for a module; then each process keeps its
part of the mean of the processes' gradients.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from apd_lens._processes import group_of, is_first, n_processes, together

# What was gathered in each use that has begun and not ended.
_USES: list[list["_Gathered"]] = []


def is_sharded(values: Tensor) -> bool:
    """Whether each process has a part."""
    return hasattr(values, "to_local")


def sharded(values: Shaped[Tensor, "n *rest"]) -> Shaped[Tensor, "n *rest"]:
    """Divided over the processes; all give the same."""
    if n_processes() == 1 or is_sharded(values):
        return values
    from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor  # takes a second to import

    mesh = DeviceMesh.from_group(group_of(values), values.device.type)
    return distribute_tensor(values.detach(), mesh, [Shard(0)], src_data_rank=None)


def like(values: Shaped[Tensor, "n *rest"], other: Shaped[Tensor, "n *others"]) -> Shaped[Tensor, "n *rest"]:
    """Divided as another is, or not."""
    return sharded(values) if is_sharded(other) else values


def own_part(values: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """What this process has, to be read and written without gradients."""
    return values.to_local() if is_sharded(values) else values  # type: ignore[attr-defined]


def put(values: Shaped[Tensor, "n *rest"], into: Shaped[Tensor, "n *rest"]) -> None:
    """Writes the numbers of a whole tensor, of which each process keeps its part."""
    own_part(into.detach()).copy_(own_part(like(values.detach().to(into.device), into)))


def whole(values: Shaped[Tensor, "n *rest"]) -> Shaped[Tensor, "n *rest"]:
    """All parts. All processes call it. See `freed_after`."""
    if not is_sharded(values):
        return values
    if torch.is_grad_enabled() and values.requires_grad:
        return _Whole.apply(values, _USES[-1] if _USES else [])
    return _all_parts(values)


def for_first(values: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """A copy; of what is sharded the whole on the CPU of the first process, and nothing in the others."""
    if not is_sharded(values):
        return values.clone()
    gathered = _all_parts(values.detach())
    return gathered.cpu() if is_first() else gathered.new_empty(0)


def freed_after(use: Callable[[], Tensor]) -> Tensor:
    """What a use of gathered tensors gives. They are freed behind it, and come back for its gradient."""
    _USES.append([])
    try:
        result = use()
    finally:
        gathered = _USES.pop()
    if not gathered or not result.requires_grad:
        return result
    result = _Return.apply(result, gathered)
    for one in gathered:
        one.free()
    return result


def _all_parts(values: Any) -> Tensor:
    with together(f"a tensor of {tuple(values.shape)} in parts"):
        return values.full_tensor().contiguous()


class _Gathered:
    """A whole tensor whose memory comes and goes, with whatever is a view of it."""

    def __init__(self, parts: Any, whole: Tensor):
        self.parts, self._whole = parts.detach(), whole.data
        self._n_bytes = whole.untyped_storage().nbytes()

    def free(self) -> None:
        self._whole.untyped_storage().resize_(0)

    def fill(self) -> None:
        self._whole.untyped_storage().resize_(self._n_bytes)
        self._whole.copy_(_all_parts(self.parts))


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Any, gathered: list[_Gathered]) -> Tensor:
        found = _all_parts(values)
        ctx.gathered = _Gathered(values, found)
        gathered.append(ctx.gathered)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        from torch.distributed.tensor import DTensor, Partial

        ctx.gathered.free()
        parts = ctx.gathered.parts
        with together(f"the gradient of a tensor of {tuple(parts.shape)} in parts"):
            of_all = DTensor.from_local(gradient / n_processes(), parts.device_mesh, [Partial()], run_check=False)
            return of_all.redistribute(placements=parts.placements), None


class _Return(torch.autograd.Function):
    """Nothing; on the way back the first step of a use, which needs again what was gathered."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, gathered: list[_Gathered]) -> Tensor:
        ctx.gathered = gathered
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        for one in ctx.gathered:
            one.fill()
        return gradient, None
