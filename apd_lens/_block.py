"""Contexts that put everything back, at whatever line an interrupt comes.

Ctrl-C, or a handler of SIGTERM that raises, can come before any line of Python. An `__exit__` in Python has a first
line, and an interrupt before that line would leave the model changed. So a `Block` has no such line: it inherits
`io.IOBase.__exit__`, which is written in C and calls `close()`. `close` resumes a generator in C, which waits inside a
`try`. If an interrupt comes while the generator puts things back, it does so once more, and then raises the interrupt.
"""

import inspect
import io
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import ContextDecorator
from functools import partial
from typing import Any, ClassVar

import torch
from torch.utils.hooks import RemovableHandle

from apd_lens._errors import AlreadyActive, ApdError

# Held while a block is entered or left, so that two threads cannot do so at once. A `with` that holds it is one line
# of code: leaving a longer one is a line event of its own, and a tracer that raises there would leave it held.
_LOCK = threading.RLock()

AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


class Part:
    """Something that is done for a while.

    `undo` puts back whatever `do` has done, however far `do` came. It may be called again, and then does nothing.

    Attributes:
        lasting: whether it stays done when its block is dropped without being left.
    """

    lasting: ClassVar[bool] = False

    def do(self) -> Any: ...

    def undo(self) -> None: ...


class Together(Part):
    """Parts that are done in their order, and undone in reverse order, all of them even if one fails."""

    def __init__(self, parts: Iterable[Part]):
        self._parts = parts
        self._done: list[Part] = []

    def do(self) -> None:
        for part in self._parts:
            self._done.append(part)
            part.do()

    def undo(self) -> None:
        errors: list[BaseException] = []
        for part in reversed(self._done):
            try:
                part.undo()
            except BaseException as error:
                errors.append(error)
        if errors:
            raise errors[0]


class Handles(Part):
    """Hooks that are on, by the handles that registering them gives.

    Args:
        handles: registers a hook each time that it is asked for the next handle.
        entered: what entering the block gives.
    """

    def __init__(self, handles: Iterable[RemovableHandle], entered: Any = None):
        self._handles, self._entered = handles, entered
        self._registered: list[RemovableHandle] = []

    def do(self) -> Any:
        self._registered.extend(self._handles)
        return self._entered

    def undo(self) -> None:
        for handle in self._registered:
            handle.remove()


class _InferenceModeOff(Part):
    """Inference mode is off, and gradients are on."""

    def __init__(self) -> None:
        self._guard = torch._C._InferenceMode(False)

    def do(self) -> None:
        self._guard.__enter__()

    def undo(self) -> None:
        self._guard.__exit__(None, None, None)


class _GradientsOff(Part):
    def __init__(self) -> None:
        self._enabled = torch.is_grad_enabled()

    def do(self) -> None:
        torch.set_grad_enabled(False)

    def undo(self) -> None:
        torch.set_grad_enabled(self._enabled)


class _FullPrecision(Part):
    def __init__(self) -> None:
        self._devices = [device for device in AUTOCAST_DEVICES if torch.is_autocast_enabled(device)]

    def do(self) -> None:
        for device in self._devices:
            torch.set_autocast_enabled(device, False)

    def undo(self) -> None:
        for device in self._devices:
            torch.set_autocast_enabled(device, True)


class Block(io.IOBase, ContextDecorator):
    """The context in which a part is done. It can be entered again when it was left. Also a decorator, of which each
    call enters a block of its own.

    Args:
        make: makes the part, each time that the block is entered.
    """

    def __init__(self, make: Callable[[], Part]):
        self.make = make
        self._life: Generator[Any, None, None] | None = None

    def start(self) -> Any:
        """Enters the block; returns what `Part.do` does.

        Raises:
            AlreadyActive: it is entered already.
        """
        lives: list[Generator[Any, None, None]] = []
        try:
            with _LOCK: return self._begin(lives)  # fmt: skip  # noqa: E701
        except BaseException as error:
            for life in lives:
                life.throw(error)  # which undoes what is done
            raise

    def _begin(self, lives: list[Any]) -> Any:
        if self._life is not None and inspect.getgeneratorstate(self._life) != inspect.GEN_CLOSED:
            raise AlreadyActive("This context is entered already. Leave it before you enter it again.")
        self._life = life = _lifetime(self.make())
        lives.append(life)
        self.close = partial(next, life, None)  # what __exit__ calls
        return next(life)

    def __enter__(self) -> Any:
        return self.start()

    def _recreate_cm(self) -> "Block":  # what ContextDecorator enters
        return Block(self.make)


def no_inference_mode() -> Block:
    """`torch.inference_mode(False)`, left at whatever line an interrupt comes."""
    return Block(_InferenceModeOff)


def no_grad() -> Block:
    """`torch.no_grad()`, left at whatever line an interrupt comes."""
    return Block(_GradientsOff)


def full_precision() -> Block:
    """Inside, autocast is off: sums and products of weights are no pass of a model. Also a decorator."""
    return Block(_FullPrecision)


def _lifetime(part: Part) -> Generator[Any, None, None]:
    """Does the part, waits, and undoes it."""
    try:
        try:
            yield part.do()
        except GeneratorExit:
            part = Part() if part.lasting else part
            raise
        finally:
            with _LOCK: part.undo()  # fmt: skip  # noqa: E701
    except ApdError:
        raise
    except BaseException:  # an interrupt; what it kept from being undone is undone here
        with _LOCK: part.undo()  # fmt: skip  # noqa: E701
        raise
