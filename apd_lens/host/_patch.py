"""Standing in for a module's `forward`, innermost and without a trace.

An instance attribute `forward` is found before the class's method. It runs inside every torch hook, TransformerLens
hook point and nnsight envoy, so that a user's own edits of a module's input come before it and edits of the output
come after it. It adds no submodule and no parameter, survives `reset_hooks()`, and is taken away by deleting it.

A module that was given to nnsight has nnsight's controller in that place. What the controller runs is looked up in a
state, so there the innermost place is in front of that state, in the eyes of the controller only: nnsight's own view
of the module's forward (its `.source`) stays what it was.
"""

import inspect
import sys
import types
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from apd_lens._block import Block, Part
from apd_lens._errors import InvalidSetting
from apd_lens.host._owner import Owner

# Called as forward(module, original, *args, **kwargs); `original` is what would have run without the patch.
PatchedForward = Callable[..., Any]


class Patch(Part):
    """The callable that stands in the place of one module's forward: calls of `module` by the owner of the context run
    `forward(module, original, *args, **kwargs)`, and calls by others what the module would run without it.

    It knows its module by a weak reference and leaves itself behind when the module is copied or pickled: a plain
    closure would go on computing with the original's weights.

    If somebody else puts their own forward over it, theirs stays in the end, and the patch becomes a pass-through.
    """

    def __init__(self, module: nn.Module, forward: PatchedForward, owner: Owner):
        self.module = weakref.ref(module)
        self.forward: PatchedForward | None = forward
        self.owner = owner
        self.previous: Callable[..., Any] | None = None

    def do(self) -> None:
        module = self.module()
        assert module is not None
        self.previous = _innermost(module)
        _set_innermost(module, self)

    def undo(self) -> None:
        self.forward = None
        module = self.module()
        if module is not None and _innermost(module) is self:
            _set_innermost(module, self.previous)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        original, forward = self.original, self.forward
        if forward is None or not self.owner.runs():
            return original(*args, **kwargs)
        return forward(self.module(), original, *args, **kwargs)

    @property
    def original(self) -> Callable[..., Any]:
        module = self.module()
        assert module is not None
        if self.previous is None and (controller := _controller(module)) is not None:
            return partial(_state(controller).body, module)
        return _class_forward(module) if self.previous is None else self.previous

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the forward underneath: transformers reads it to see which arguments a model takes."""
        return inspect.signature(self.original)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.previous is not None:
            return _identity, (self.previous,)
        return _class_forward, (self.module(),)


class _Front:
    """What nnsight's controller of a patched module takes for its state: runs the patch, and is the state in all else.

    Leaves itself behind when the module is copied or pickled.
    """

    def __init__(self, state: Any, patch: Patch):
        self.state, self.patch = state, patch

    def body(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.patch(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.state, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _identity, (self.state,)


def _identity(value: Any) -> Any:
    return value


def _class_forward(module: Any) -> Callable[..., Any]:
    return types.MethodType(type(module).forward, module)


class NotBehindATrace(Part):
    """Refuses a context that a trace of nnsight has taken its block out of, to run it later.

    Raises:
        InvalidSetting: at the end of the context.
    """

    def undo(self) -> None:
        error = sys.exception()
        if type(error).__name__ == "ExitTracingException" and type(error).__module__.startswith("nnsight."):
            raise InvalidSetting(
                "In one `with` statement, this context came after a trace of nnsight, which runs the block without "
                "what comes after it. Put it before the trace: `with decomposition.sparse(mask), model.trace(x):`, or "
                "in a `with` of its own."
            ) from None


def _innermost(module: nn.Module) -> Callable[..., Any] | None:
    """What was put in the innermost place of a module, by us or (without nnsight) by anybody."""
    controller = _controller(module)
    if controller is None:
        return module.__dict__.get("forward")
    return controller.state.patch if isinstance(controller.state, _Front) else None


def _set_innermost(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    controller = _controller(module)
    if controller is not None:
        state = _state(controller)
        controller.state = _Front(state, forward) if isinstance(forward, Patch) else state
    elif forward is not None:  # written to `__dict__`, since some hosts redirect attribute writes
        module.__dict__["forward"] = forward
    else:
        del module.__dict__["forward"]


def _controller(module: nn.Module) -> Any:
    """nnsight's controller of a module; None where there is none."""
    controller = module.__dict__.get("forward")
    if not type(controller).__module__.startswith("nnsight."):
        return None
    _take_back(module, controller)
    return controller


def _state(controller: Any) -> Any:
    return controller.state.state if isinstance(controller.state, _Front) else controller.state


def _take_back(module: nn.Module, controller: Any) -> None:
    """A module that nnsight wrapped inside a context: nnsight took our patch for the module's own forward.

    It keeps such a forward in a function of its own that closes over it.
    """
    state = _state(controller)
    if not str(getattr(state.original, "__module__", "")).startswith("nnsight."):
        return
    closed_over = [cell.cell_contents for cell in state.original.__closure__ or ()]
    outer = next((value for value in closed_over if isinstance(value, Patch)), None)
    if outer is None:
        return
    inner = outer
    while isinstance(inner.previous, Patch):
        inner = inner.previous
    state.body = state.original = _unbound(module, inner.previous)
    inner.previous = None
    controller.state = _Front(state, outer)


def _unbound(module: nn.Module, forward: Callable[..., Any] | None) -> Callable[..., Any]:
    """A module's own forward as nnsight keeps it: the module is its first argument."""
    if forward is None:
        return type(module).forward
    if isinstance(forward, types.MethodType) and forward.__self__ is module:
        return forward.__func__
    return lambda _, *args, **kwargs: forward(*args, **kwargs)


def in_nnsight_trace(module: nn.Module) -> bool:
    """Whether a trace of the user's is running on the module."""
    controller = _controller(module)
    return controller is not None and controller.state.active()[0] is not None


def outside_traces(model: nn.Module) -> Block:
    """Inside, forwards of the model are no part of a trace of nnsight that is running on it."""
    return Block(lambda: _OutsideTraces(model))


class _OutsideTraces(Part):
    def __init__(self, model: nn.Module):
        controller = _controller(model)
        self._interleaver = None if controller is None else controller.state.active()[0]

    def do(self) -> None:
        if self._interleaver is not None:
            self._interleaver.interleaving = False

    def undo(self) -> None:
        if self._interleaver is not None:
            self._interleaver.interleaving = True


class Uncompiled(Part):
    """A model of which torch.compile has compiled all or a part runs as it was written: what was compiled does not see
    what stands in for a forward, and cannot be compiled with it."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._stance: Any = None

    def do(self) -> None:
        modules = self._model.modules() if "torch._dynamo" in sys.modules else ()
        if any(
            type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None
            for module in modules
        ):
            self._stance = torch.compiler.set_stance("force_eager")

    def undo(self) -> None:
        if self._stance is not None:
            self._stance.__exit__(None, None, None)


def is_patched(model: nn.Module) -> bool:
    """Whether a patch of ours is at work on the model or on one of its submodules."""
    patches = map(_innermost, model.modules())
    return any(isinstance(patch, Patch) and not patch.owner.is_over for patch in patches)
