"""Standing in for a module's `forward`, innermost and without a trace.

An instance attribute `forward` is found before the class's method. It runs inside every torch hook, TransformerLens
hook point and nnsight envoy, so that a user's own edits of a module's input come before it and edits of the output
come after it. It adds no submodule and no parameter, survives `reset_hooks()`, and is taken away by deleting it.
"""

import copy
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# Called as forward(module, original, *args, **kwargs); `original` is what would have run without the patch.
PatchedForward = Callable[..., Any]


class _Patch:
    """The callable that stands in the `forward` slot of one module.

    It knows its module by a weak reference and leaves itself behind when the module is copied or pickled: a plain
    closure would go on computing with the original's weights.
    """

    def __init__(self, module: nn.Module, forward: PatchedForward, previous: Callable[..., Any] | None):
        self.module = weakref.ref(module)
        self.forward: PatchedForward | None = forward
        self.previous = previous

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module()
        assert module is not None
        original = self.previous or _class_forward(module)
        if self.forward is None:
            return original(*args, **kwargs)
        return self.forward(module, original, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        if self.previous is not None:
            return copy.deepcopy(self.previous, memo)
        return _class_forward(memo[id(self.module())])

    def __reduce__(self) -> tuple[Any, ...]:
        if self.previous is not None:
            return _identity, (self.previous,)
        return _class_forward, (self.module(),)


def _identity(forward: Callable[..., Any]) -> Callable[..., Any]:
    return forward


def _class_forward(module: nn.Module) -> Callable[..., Any]:
    return types.MethodType(type(module).forward, module)


@contextmanager
def patched(module: nn.Module, forward: PatchedForward) -> Iterator[None]:
    """Inside, calls of `module` run `forward(module, original, *args, **kwargs)`; after it the module is as before.

    Written to `__dict__`, since some hosts redirect attribute writes. If somebody else has put their own forward over
    ours meanwhile, theirs stays and ours becomes a pass-through.
    """
    slot = module.__dict__
    patch = _Patch(module, forward, previous=slot.get("forward"))
    try:
        slot["forward"] = patch
        yield
    finally:
        patch.forward = None
        if slot.get("forward") is patch:
            if patch.previous is None:
                del slot["forward"]
            else:
                slot["forward"] = patch.previous


def is_patched(model: nn.Module) -> bool:
    """Whether a patch of ours is at work on the model or on one of its submodules."""
    slots = (module.__dict__.get("forward") for module in model.modules())
    return any(isinstance(slot, _Patch) and slot.forward is not None for slot in slots)
