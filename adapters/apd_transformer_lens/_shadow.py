"""Standing in for attributes of a module while its forward runs, without a trace."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class Shadow:
    """Stands in for a submodule while its parent's forward runs.

    Calls the submodule that the parent has at that moment, with whatever the user has hooked to it or spliced in
    there. `before` may replace what it is given (a y that no hook of the user's has seen yet); `after` is shown what
    the code behind it receives (an x with all of the user's edits).
    """

    def __init__(self, before: Callable[[Tensor], Tensor] | None = None, after: Callable[[Tensor], None] | None = None):
        self.before, self.after = before, after
        self.real: Any = None

    def __call__(self, value: Tensor, *args: Any) -> Any:
        out = self.real(value if self.before is None else self.before(value), *args)
        if self.after is not None:
            self.after(out)
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


@contextmanager
def shadowed(parent: nn.Module, **shadows: Any) -> Iterator[None]:
    """Inside, the parent has these attributes: `Shadow`s of what it has there, or anything else.

    Instance attributes are found before submodules and methods, so they go into the parent's `__dict__`.
    """
    slot = parent.__dict__
    previous = {name: slot[name] for name in shadows if name in slot}
    try:
        for name, shadow in shadows.items():
            if isinstance(shadow, Shadow):
                shadow.real = getattr(parent, name)
            slot[name] = shadow
        yield
    finally:
        for name in shadows:
            slot.pop(name, None)
        slot.update(previous)
