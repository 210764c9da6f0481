"""Types and shapes in all functions of the package, checked at the first call of each in every test.

To check every call is most of what a run then does: a training step of a small model takes six times as long. Half of
that is for functions inside functions, which are made ready to be checked at each call of the function around them.
"""

import functools
from collections import Counter
from types import CodeType, FunctionType
from typing import Any

import jaxtyping
from jaxtyping import _decorator
from jaxtyping._import_hook import Typechecker

seen: Counter[CodeType] = Counter()  # calls in this test; tests/conftest.py clears it
every_call = jaxtyping.jaxtyped


def first_call(function: Any = None, *, typechecker: Any) -> Any:
    """In the place of jaxtyping's decorator, which its import hook puts on all functions and classes."""
    if function is None:
        return functools.partial(first_call, typechecker=typechecker)
    of_the_hook = typechecker in Typechecker.lookup.values()  # and not the check of users' arguments
    if not (of_the_hook and isinstance(function, FunctionType)):
        return every_call(function, typechecker=typechecker)  # which comes back here with the functions of a class
    code = function.__code__
    if "<locals>" in function.__qualname__:
        seen[code] += 1
        return every_call(function, typechecker=typechecker) if seen[code] == 1 else function
    checked = every_call(function, typechecker=typechecker)

    def call(*args: Any, **kwargs: Any) -> Any:
        seen[code] += 1
        return (checked if seen[code] == 1 else function)(*args, **kwargs)

    # Messages name the frame of the user's that is nearest, and know jaxtyping's by file and module.
    of_jaxtyping = call.__code__.replace(co_filename=_decorator.__file__)
    names = {"__name__": _decorator.__name__, "seen": seen}
    return functools.wraps(function)(FunctionType(of_jaxtyping, names, closure=call.__closure__))


def install() -> None:
    """Holds for what is imported from now on."""
    jaxtyping.jaxtyped = _decorator.jaxtyped = first_call
