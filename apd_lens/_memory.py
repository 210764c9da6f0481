"""One budget for temporaries, and what fits into it."""

# Bytes that the temporaries of one computation may take, where the user says nothing.
BUDGET = 2**29


def fitting(bytes_each: float, memory: int | None = None) -> int:
    """How many things of so many bytes fit into the memory at once; at least one.

    >>> fitting(100, memory=1000)
    10
    """
    return max(1, int((BUDGET if memory is None else memory) // max(1, bytes_each)))


def slices(length: int, at_once: int) -> list[slice]:
    """0 to `length` in pieces.

    >>> slices(5, 2)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    return [slice(first, min(first + at_once, length)) for first in range(0, length, at_once)]


def chunks(length: int, bytes_each: float, memory: int | None = None) -> list[slice]:
    """0 to `length` in pieces that fit into the memory."""
    return slices(length, fitting(bytes_each, memory))
