"""Batches: what a model is called with."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from apd_lens._errors import InvalidBatches, NonFinite

# A tensor, a tuple or list of tensors (positional arguments), a mapping (keyword arguments), or whatever else the
# model takes as its one argument (a list of strings for a HookedTransformer with a tokenizer).
Batch = Any


def arguments(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the call `model(*args, **kwargs)`."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, tuple) or (isinstance(batch, list) and all(isinstance(item, Tensor) for item in batch)):
        return tuple(batch), {}
    return (batch,), {}


def call(model: nn.Module, batch: Batch) -> Any:
    """The model's return value on a batch."""
    args, kwargs = arguments(batch)
    return model(*args, **kwargs)


def tensors(batch: Batch) -> list[Tensor]:
    """The tensors among a batch's arguments."""
    args, kwargs = arguments(batch)
    return [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]


def n_examples(batch: Batch) -> int:
    """Length of the batch axis: the first axis of the first tensor, or the length of a list of texts."""
    for value in tensors(batch):
        if value.ndim > 0:
            return len(value)
    return len(batch) if isinstance(batch, list | tuple) else 1


def some_examples(batch: Batch, examples: slice) -> Batch:
    """The batch of those examples alone: tensors are cut that have an entry for each, all else stays."""
    return _with_examples(batch, lambda value: value[examples])


def replicated(batch: Batch, n: int) -> Batch:
    """The whole batch n times over: tensors are repeated that have an entry for each example, all else stays.

    >>> replicated({"x": torch.tensor([[1], [2]]), "scale": 0.5}, 2)
    {'x': tensor([[1],
            [2],
            [1],
            [2]]), 'scale': 0.5}
    """
    return _with_examples(
        batch, lambda value: value.repeat(n, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) else value * n
    )


def _with_examples(batch: Batch, change: Callable[[Any], Any]) -> Batch:
    """The batch with what has an entry for each example changed."""
    n = n_examples(batch)

    def changed(value: Any) -> Any:
        return change(value) if isinstance(value, Tensor) and value.ndim > 0 and len(value) == n else value

    if isinstance(batch, Mapping):
        return {key: changed(value) for key, value in batch.items()}
    if isinstance(batch, tuple | list) and tensors(batch):
        return type(batch)(changed(value) for value in batch)
    return change(batch) if isinstance(batch, list | tuple) else changed(batch)


def same_arguments(batch: Batch, previous: Batch, previous_versions: list[int]) -> bool:
    """Whether a batch is made of the very same objects as another was, with no tensor changed in place since."""
    args, kwargs = arguments(batch)
    previous_args, previous_kwargs = arguments(previous)
    return (
        kwargs.keys() == previous_kwargs.keys()
        and len(args) == len(previous_args)
        and all(now is before for now, before in zip(args, previous_args, strict=True))
        and all(kwargs[name] is previous_kwargs[name] for name in kwargs)
        and versions(batch) == previous_versions
    )


def versions(batch: Batch) -> list[int]:
    """For each tensor, how often it was changed in place; -1 where torch does not count (inference mode)."""
    return [-1 if value.is_inference() else value._version for value in tensors(batch)]


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on the model's device."""

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        # A tensor made in inference mode cannot be part of a graph, but a copy can.
        return value.clone().to(device) if value.is_inference() else value.to(device)

    if isinstance(batch, Mapping):
        return {key: move(value) for key, value in batch.items()}
    if isinstance(batch, tuple):
        return tuple(move(value) for value in batch)
    if isinstance(batch, list):
        return [move(value) for value in batch]
    return move(batch)


def check_finite(batch: Batch, where: str) -> None:
    """Raises NonFinite if an input holds NaN or infinity."""
    for index, value in enumerate(tensors(batch)):
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise NonFinite(
                f"{where}: input tensor {index} of the batch (shape {tuple(value.shape)}) holds "
                f"{int((~value.isfinite()).sum())} values that are NaN or infinite. Nothing was computed from it."
            )


def each(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Every batch, once.

    Raises:
        InvalidBatches: not iterable, empty, or a bare tensor.
    """
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        came = f"one tensor of shape {tuple(batches.shape)}" if isinstance(batches, Tensor) else type(batches).__name__
        raise InvalidBatches(
            f"Expected an iterable of batches (a list, a DataLoader), got {came}. Of one batch: [batch]."
        )
    n_batches = 0
    for batch in batches:
        n_batches += 1
        yield batch
    if n_batches == 0:
        raise InvalidBatches("There are no batches: the iterable is empty, or was used up before.")


def stream(batches: Iterable[Batch] | Callable[[int], Batch], first_step: int = 0) -> Iterator[Batch]:
    """Batches without end: a function step -> batch is called for each step, an iterable is gone through again.

    Raises:
        InvalidBatches: not iterable, empty, or used up after one pass (a generator); or a bare tensor.
    """
    if isinstance(batches, Tensor):
        raise InvalidBatches(
            f"Expected a stream of batches, got one tensor of shape {tuple(batches.shape)}. For one batch that is used "
            "in every step, give [tensor]."
        )
    if not isinstance(batches, Iterable):
        if not callable(batches):
            raise InvalidBatches(
                f"Expected batches as an iterable that can be gone through again (a DataLoader, a list) or a function "
                f"step -> batch, got {type(batches).__name__}."
            )
        step = first_step
        while True:
            yield batches(step)
            step += 1
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
                else f"The stream of batches ended after {n_batches} and cannot be gone through again. Give a list, a "
                "DataLoader or a function step -> batch instead of an iterator."
            )
