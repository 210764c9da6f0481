"""Who runs on components: the code inside a context, and what that code starts, but nobody else.

Entering a context writes its owner into a context variable. Python hands context variables on to tasks and to
`asyncio.to_thread`, and not to other tasks or threads.
"""

import inspect
import sys
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from types import FrameType
from typing import Any

from apd_lens._block import Part
from apd_lens._errors import AlreadyActive

_INSIDE: ContextVar[tuple["Owner", ...]] = ContextVar("apd_lens owners", default=())

# Between the `with` statement and the owner: ours, what drives `ExitStack`, and what checks types in tests.
_BETWEEN = ("apd_lens", "contextlib", "jaxtyping", "beartype")
# Frameworks that pause a generator while the code runs for which it entered the context.
_DRIVERS = ("contextlib", "_pytest", "pytest_asyncio", "anyio")


class Owner(Part):
    """The code that entered one context."""

    def __init__(self, model: str):
        self._model = model
        self._over = True
        self._thread = threading.get_ident()
        self._greenlet = next(_greenlets(), None)
        self._generator: FrameType | None = None

    def do(self) -> None:
        self._generator = _generator_that_can_pause()
        _INSIDE.set((*_INSIDE.get(), self))
        self._over = False

    def undo(self) -> None:
        self._over, self._generator = True, None
        _INSIDE.set(tuple(owner for owner in _INSIDE.get() if owner is not self))

    @property
    def is_over(self) -> bool:
        """Whether the context was left."""
        return self._over

    def runs(self) -> bool:
        """Whether the code that runs now is inside the context. False in other threads.

        Raises:
            AlreadyActive: where it cannot be told for whom the code runs: in another task of the same thread, in a
                thread that Python did not start, or while the generator that entered the context is paused.
        """
        if self._over:
            return False
        if not self._is_inside():
            other = threading.get_ident() != self._thread
            if other and not isinstance(threading.current_thread(), threading._DummyThread):
                return False
            where = (
                "in a thread that Python did not start, such as that of a backward pass on a GPU"
                if other
                else "in another asyncio task, callback or notebook cell"
            )
            raise AlreadyActive(
                f"This {self._model} is inside a sparse, ablate or only context, and a forward {where} calls it too. "
                "Leave the context first, or give that code a copy of the model: copy.deepcopy(model)."
            )
        generator = self._generator
        if generator is not None and not _is_running(generator):
            code = generator.f_code
            raise AlreadyActive(
                f"The generator {code.co_qualname} ({code.co_filename}:{generator.f_lineno}) entered a sparse, ablate "
                f"or only context of this {self._model} and is paused inside it, while other code calls the model. "
                "Leave the context before the generator yields, or give the other code a copy: copy.deepcopy(model)."
            )
        return True

    def _is_inside(self) -> bool:
        if self in _INSIDE.get():
            return True
        # A greenlet, such as the block of a trace of nnsight, has context variables of its own.
        current, *parents = [*_greenlets()] or [None]
        return any(
            parent.gr_context is not None and self in parent.gr_context.get(_INSIDE, ()) for parent in parents
        ) or (self._greenlet is not None and current in _lineage(self._greenlet.parent))


def _generator_that_can_pause() -> FrameType | None:
    """The frame of the generator whose `with` statement enters the context, if it is one that can be paused while
    others run the model. `contextlib` and pytest pause theirs on purpose: the context then belongs to the code for
    which they run it."""
    frame = _outside(sys._getframe(), _BETWEEN)
    while frame is not None and frame.f_code.co_flags & (inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR):
        driver = frame.f_back
        if driver is None or not _is_of(driver, _DRIVERS):
            return frame
        frame = _outside(driver, (*_BETWEEN, *_DRIVERS))
    return None


def _outside(frame: FrameType | None, modules: tuple[str, ...]) -> FrameType | None:
    while frame is not None and _is_of(frame, modules):
        frame = frame.f_back
    return frame


def _is_of(frame: FrameType, modules: tuple[str, ...]) -> bool:
    return frame.f_globals.get("__name__", "").partition(".")[0] in modules


def _is_running(frame: FrameType) -> bool:
    """Whether a generator's frame is on the stack of a thread, and so is not paused."""
    tops = [sys._getframe(), *(greenlet.gr_frame for greenlet in _greenlets()), *sys._current_frames().values()]
    return any(frame in _stack(top) for top in tops)


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _greenlets() -> Iterator[Any]:
    """The greenlet that runs, and those that wait for it; none where nothing has imported them."""
    if "greenlet" in sys.modules:
        yield from _lineage(sys.modules["greenlet"].getcurrent())


def _lineage(greenlet: Any) -> Iterator[Any]:
    while greenlet is not None:
        yield greenlet
        greenlet = greenlet.parent
