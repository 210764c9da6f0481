"""Types and shapes, checked where users call: jaxtyping annotations, read by beartype.

Inside the package nothing is checked at run time, except in the tests, which check everything.
"""

import dataclasses
import functools
import math
import random
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar, cast

from jaxtyping import TypeCheckError, jaxtyped

from apd_lens._block import Block, Part
from apd_lens._errors import ApdError, InvalidSetting, ShapeMismatch


@contextmanager
def _object_as_python_made_it() -> Iterator[None]:
    """Inside, `object` is without the method `save` that nnsight (0.8) gives it, which cannot be hashed.

    Importing beartype (0.23) hashes all that `object` has, so it fails where nnsight was imported first.
    """
    added = vars(object).get("save")
    if added is None or "nnsight._c" not in sys.modules:
        yield
        return
    mounting = sys.modules["nnsight._c"]
    mounting.unmount("save")
    try:
        yield
    finally:
        mounting.mount(added.__func__, "save")


with _object_as_python_made_it():
    from beartype import BeartypeConf, beartype
    from beartype.door import is_bearable

_P = ParamSpec("_P")
_R = TypeVar("_R")

# So many characters of a wrong argument are shown.
_SHOWN = 300

# An int is welcome where a float is expected.
_CONF = BeartypeConf(is_pep484_tower=True)


def _undrawn() -> Block:
    """Python's global random state stays as it is: beartype draws which item of a list it looks at."""
    return Block(_RandomState)


class _RandomState(Part):
    def __init__(self) -> None:
        self._state = random.getstate()

    def undo(self) -> None:
        random.setstate(self._state)


def checked(function: Callable[_P, _R], error: type[ApdError] = ShapeMismatch) -> Callable[_P, _R]:
    """The function, raising `error` where an argument or the result is not of its annotated type and shape."""
    inner = jaxtyped(function, typechecker=lambda signature: _undrawn()(beartype(conf=_CONF)(signature)))

    @functools.wraps(function)
    def outer(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return inner(*args, **kwargs)
        except TypeCheckError as mismatch:
            if f"{function.__module__}.{function.__qualname__}" not in str(mismatch).partition("\n")[0]:
                raise  # somebody else's, such as the user's model
            raise error(_brief(str(mismatch))) from None

    return outer


def _brief(message: str) -> str:
    """jaxtyping's message without the list of all arguments and annotations: which one, what came (the beginning, if it
    is long), what was expected, and what the axes' names stand for."""
    problem, _, rest = message.partition("----------------------")
    before, named, came = problem.partition("Actual value: ")
    came, expected, of_type = came.partition("\nExpected type: ")
    if len(came) > _SHOWN:
        came = f"{came[:_SHOWN].splitlines()[0]} …"
    problem = before + named + came + expected + of_type
    _, current_values, axes = rest.partition("The current values for each jaxtyping axis")
    return (problem + current_values + axes).strip()


def check_fields(settings: Any) -> None:
    """Raises InvalidSetting if a field of a dataclass does not hold what it is annotated with."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        with _undrawn():
            fits = is_bearable(value, cast(Any, field.type), conf=_CONF)
        if isinstance(value, bool) and "bool" not in str(field.type):
            fits = False  # to Python, True is an int
        if not fits:
            expected = field.type.__name__ if isinstance(field.type, type) else re.sub(r"\b\w+\.", "", str(field.type))
            raise InvalidSetting(f"{type(settings).__name__}({field.name}=...) takes {expected}, got {value!r}.")
        if isinstance(value, float) and math.isnan(value):
            raise InvalidSetting(f"{type(settings).__name__}({field.name}=...) takes a number, got NaN.")
