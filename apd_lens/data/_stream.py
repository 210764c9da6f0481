"""Streams of batches: one pass for an analysis, without end for a training."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from apd_lens._errors import InvalidBatches
from apd_lens.data._batch import Batch


def one_pass(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Every batch, once.

    Raises:
        InvalidBatches: not iterable, empty, or a bare tensor or mapping.
    """
    _check_several(batches, "an iterable that ends (a list, a DataLoader)")
    empty = True
    for batch in batches:
        empty = False
        yield batch
    if empty:
        raise InvalidBatches(
            "The stream of batches is empty, or was used up before. There are no batches to look at: give at least "
            "one. A generator can be gone through once only; give a list of it, list(generator), or a DataLoader."
        )


def stream(batches: Iterable[Batch] | Callable[[int], Batch], first_step: int = 0) -> Iterator[Batch]:
    """Batches without end: a function step -> batch is called for each step, an iterable is gone through again.

    Raises:
        InvalidBatches: not iterable, empty, or used up after one pass (a generator); or one batch instead of several.
    """
    if not isinstance(batches, Iterable) and callable(batches):
        step = first_step
        while True:
            yield batches(step)
            step += 1
    _check_several(
        batches, "an iterable that can be gone through again (a list, a DataLoader) or a function step -> batch"
    )
    n_batches = 0
    while True:
        n_before = n_batches
        for batch in batches:
            n_batches += 1
            yield batch
        if n_batches == n_before:
            raise InvalidBatches(
                "The stream of batches is empty: expected at least one batch."
                if n_batches == 0
                else f"The stream of batches ended after {n_batches} and cannot be gone through again: a generator or "
                "iterator gives each batch once, and training goes through them until all its steps are done. Give a "
                "list of it, list(generator), a DataLoader, or a function step -> batch."
            )


def _check_several(batches: Any, expected: str) -> None:
    """Raises InvalidBatches for one batch in the place of several, and for what cannot be gone through."""
    is_one = isinstance(batches, Tensor | Mapping | str | bytes) or hasattr(batches, "__array__")
    if not is_one and isinstance(batches, Iterable):
        return
    came = "tensor" if isinstance(batches, Tensor) else type(batches).__name__
    if is_one and (shape := getattr(batches, "shape", None)) is not None:
        came = f"one {came} of shape {tuple(shape)}"
    raise InvalidBatches(
        f"Expected batches, {expected}, got {came}. Of one batch give [batch], of a function step -> batch, where the "
        "batches are to end, some: [function(step) for step in range(20)]."
    )


def check_again(batches: Iterable[Batch], times: int) -> None:
    """Raises InvalidBatches if batches cannot be gone through so many times."""
    if isinstance(batches, Iterator):
        raise InvalidBatches(
            f"The batches are gone through {times} times, but this {type(batches).__name__} can be only once. Give a "
            "list or a DataLoader."
        )
