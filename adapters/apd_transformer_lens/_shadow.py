"""Standing in for attributes of a module while its forward runs in this thread, without a trace."""

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from apd_lens.host import Block, Part

# Called as stand_in(real, *args): `real` is what the module has there.
StandIn = Callable[..., Any]


class Shadow:
    """Stands in for a submodule while its parent's forward runs.

    Calls the submodule with whatever the user has hooked to it or spliced in there. `before` may replace what it is
    given (a y that no hook of the user's has seen yet); `after` is shown what the code behind it receives (an x with
    all of the user's edits).
    """

    def __init__(self, before: Callable[[Tensor], Tensor] | None = None, after: Callable[[Tensor], None] | None = None):
        self.before, self.after = before, after

    def __call__(self, real: Callable[..., Any], value: Tensor, *args: Any) -> Any:
        out = real(value if self.before is None else self.before(value), *args)
        if self.after is not None:
            self.after(out)
        return out


def shadowed(parent: nn.Module, **stand_ins: StandIn) -> Block:
    """Inside, in this thread, these stand in for submodules and methods of the parent: `Shadow`s, or anything that is
    called as stand_in(real, *args). In other threads the parent has what it had."""
    return Block(lambda: _Shadows(parent, stand_ins))


class _Shadows(Part):
    """Instance attributes are found before submodules and methods, so they go into the parent's `__dict__`.

    `Block` sees to it that no two threads are in `do` or `undo` at once.
    """

    def __init__(self, parent: nn.Module, stand_ins: dict[str, StandIn]):
        self._parent, self._stand_ins = parent, stand_ins

    def do(self) -> None:
        slot = self._parent.__dict__
        for name, stand_in in self._stand_ins.items():
            if not isinstance(slot.get(name), _Switch):
                slot[name] = _Switch(self._parent, name)
            slot[name].of_thread.append((threading.get_ident(), stand_in))

    def undo(self) -> None:
        slot = self._parent.__dict__
        for name, stand_in in self._stand_ins.items():
            switch = slot.get(name)
            if isinstance(switch, _Switch):
                switch.of_thread = [(thread, other) for thread, other in switch.of_thread if other is not stand_in]
                if not switch.of_thread:
                    del slot[name]
                    slot.update(switch.previous)


class _Switch:
    """What is put into a module's `__dict__`: in each thread its own stand-in, and elsewhere what the module has.

    Attributes:
        previous: what the `__dict__` had under that name, if anything.
        of_thread: threads and their stand-ins; the last one of a thread is at work.
    """

    def __init__(self, parent: nn.Module, name: str):
        self.real = getattr(parent, name)
        self.previous = {name: parent.__dict__[name]} if name in parent.__dict__ else {}
        self.of_thread: list[tuple[int, StandIn]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        here = threading.get_ident()
        for thread, stand_in in reversed(self.of_thread):
            if thread == here:
                return stand_in(self.real, *args, **kwargs)
        return self.real(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


def kept(module: nn.Module, attribute: str) -> Block:
    """After it, an instance attribute is what it was before."""
    return Block(lambda: _Kept(module, attribute))


class _Kept(Part):
    def __init__(self, module: nn.Module, attribute: str):
        self._slot, self._attribute = module.__dict__, attribute
        self._before = {attribute: self._slot[attribute]} if attribute in self._slot else {}

    def undo(self) -> None:
        if not self._before:
            self._slot.pop(self._attribute, None)
        self._slot.update(self._before)
