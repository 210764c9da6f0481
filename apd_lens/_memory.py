"""One budget for temporaries, and what fits into it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from apd_lens._errors import InvalidSetting

# Bytes that the temporaries of one computation may take, where the user says nothing.
BUDGET = 2**29

# Of a limit, the share that passes of the model may take; the rest is for temporaries beside them.
_PASSES = 0.75

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_LIMIT: ContextVar[int | None] = ContextVar("limit", default=None)


@contextmanager
def memory(limit: int | str | None) -> Iterator[None]:
    """Inside, a training step, and every analysis, takes no more bytes for its passes and temporaries: it goes through
    some examples at a time. What is there before does not count: the model, factors, gradients and moments.

    Args:
        limit: bytes, or a text such as "4 GB"; None for what it is outside.

    Raises:
        InvalidSetting: no positive number of bytes.

    >>> with memory("1 KB"):
    ...     fitting(100)
    2
    """
    token = _LIMIT.set(_LIMIT.get() if limit is None else n_bytes(limit))
    try:
        yield
    finally:
        _LIMIT.reset(token)


def n_bytes(limit: int | str) -> int:
    """A number of bytes, or a text that says one.

    >>> n_bytes("1.5 GB")
    1500000000
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?B?)\s*", str(limit), re.IGNORECASE)
    number = int(float(found[1]) * _UNITS.get(found[2].upper(), 0)) if found else 0
    if number < 1:
        raise InvalidSetting(f'memory is a number of bytes, or a text such as "4 GB" or "500 MB"; got {limit!r}.')
    return number


def at_once(n: int, bytes_each: float, kept: float = 0) -> int:
    """How many of n things of so many bytes may be there at once: all, unless `memory` limits it to fewer.

    Args:
        kept: bytes of what is there beside them all the time.
    """
    limit = _LIMIT.get()
    return n if limit is None else min(n, max(1, int(_PASSES * (limit - kept) // max(1, bytes_each))))


def fitting(bytes_each: float, memory: int | None = None) -> int:
    """How many things of so many bytes fit into the memory at once; at least one.

    >>> fitting(100, memory=1000)
    10
    """
    budget, limit = BUDGET if memory is None else memory, _LIMIT.get()
    if limit is not None:
        budget = min(budget, (1 - _PASSES) * limit)
    return max(1, int(budget // max(1, bytes_each)))


def slices(length: int, at_once: int) -> list[slice]:
    """0 to `length` in pieces.

    >>> slices(5, 2)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    return [slice(first, min(first + at_once, length)) for first in range(0, length, at_once)]


def chunks(length: int, bytes_each: float, memory: int | None = None) -> list[slice]:
    """0 to `length` in pieces that fit into the memory."""
    return slices(length, fitting(bytes_each, memory))
