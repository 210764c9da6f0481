"""Two devices where there is one: tensors that say that they are on cpu:0 or cpu:1, and do not meet."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

FIRST, SECOND = torch.device("cpu", 0), torch.device("cpu", 1)
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class OnDevice(Tensor):
    """A tensor of a device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> "OnDevice":
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=device
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __deepcopy__(self, memo: Any) -> nn.Parameter:
        return nn.Parameter(OnDevice(self.inner.clone(), self.device), self.requires_grad)

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, **options: Any) -> Any:
        return self.inner.numpy(**options)

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()


def _run(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Does it, unless its tensors are on different devices."""
    given = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, OnDevice)]
    devices = {tensor.device for tensor in given}
    if len(devices) > 1 and func not in _COPIES:
        raise RuntimeError(f"{func}: expected all tensors on one device, got {sorted(map(str, devices))}")
    asked = kwargs.get("device")
    device = given[0].device if asked is None and given else asked
    inner = tree_map(lambda value: value.inner if isinstance(value, OnDevice) else value, (args, kwargs))
    found = func(*inner[0], **inner[1])
    of_inner = {id(tensor.inner): tensor for tensor in given}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor) or device is None or torch.device(device).index is None:
            return value
        return of_inner[id(value)] if id(value) in of_inner else OnDevice(value, torch.device(device))

    return tree_map(wrapped, found)


class TwoDevices(TorchDispatchMode):
    """Inside, what is made on a device is of that device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def placed(module: nn.Module, device: torch.device) -> nn.Module:
    """The module, on a device, which its inputs are taken to, as accelerate's hooks do."""
    for inside in module.modules():
        for name, parameter in list(inside.named_parameters(recurse=False)):
            setattr(inside, name, nn.Parameter(OnDevice(parameter.detach(), device), parameter.requires_grad))
    module.register_forward_pre_hook(lambda _, args: tuple(value.to(device) for value in args))
    return module
