"""Batches: what a model is called with."""

import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from apd_lens._errors import InvalidBatches
from apd_lens._finite import Reading, count_not_finite, on_gpu, raise_first

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
    try:
        return model(*args, **kwargs)
    except TypeError as error:
        _check_can_take(model, args, kwargs, error)
        raise


def _check_can_take(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: TypeError) -> None:
    """Raises InvalidBatches if the model's forward has no such parameters."""
    try:
        inspect.signature(type(model).forward).bind(model, *args, **kwargs)
    except TypeError as misfit:
        given = [type(value).__name__ for value in args] + [f"{name}={type(kwargs[name]).__name__}" for name in kwargs]
        raise InvalidBatches(
            f"{type(model).__name__} cannot be called with what the batch gives it, ({', '.join(given)}): {misfit}. "
            "The tensors of a tuple or list are positional arguments, the items of a dict keyword arguments. Where a "
            "DataLoader gives (x, y) and the model takes x, pick it: batches=[x for x, _ in loader]."
        ) from error
    except ValueError:  # a signature that Python cannot tell
        return


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


def picked_examples(batch: Batch, indices: Sequence[int]) -> Batch:
    """The batch of those examples, in that order; an example may come several times.

    >>> picked_examples((torch.tensor([[1], [2]]), 0.5), [1, 1, 0])
    (tensor([[2],
            [2],
            [1]]), 0.5)
    """
    return _with_examples(
        batch,
        lambda value: value[list(indices)] if isinstance(value, Tensor) else type(value)(value[i] for i in indices),
    )


def same_but_for_examples(batch: Batch) -> Hashable:
    """Equal for batches of one example each that `joined` can join: alike in all that an example does not change."""

    def of_value(value: Any) -> Hashable:
        if isinstance(value, Tensor):
            return (value.shape, value.dtype) if value.ndim > 0 and len(value) == 1 else id(value)
        return value if isinstance(value, Hashable) else id(value)

    args, kwargs = arguments(batch)
    if args and isinstance(args[0], list | tuple):  # of texts
        return "texts"
    return tuple(map(of_value, args)), tuple((name, of_value(value)) for name, value in kwargs.items())


def joined(batches: Sequence[Batch]) -> Batch:
    """Several batches of one example each, as one; they are alike by `same_but_for_examples`.

    >>> joined([(torch.tensor([[1]]), 0.5), (torch.tensor([[2]]), 0.5)])
    (tensor([[1],
            [2]]), 0.5)
    """
    first = batches[0]

    def together(values: Sequence[Any]) -> Any:
        of_examples = isinstance(values[0], Tensor) and values[0].ndim > 0 and len(values[0]) == 1
        return torch.cat(list(values)) if of_examples else values[0]

    if isinstance(first, Mapping):
        return {key: together([batch[key] for batch in batches]) for key in first}
    if isinstance(first, tuple | list) and tensors(first):
        return type(first)(together(values) for values in zip(*batches, strict=True))
    return (
        type(first)(item for batch in batches for item in batch)
        if isinstance(first, list | tuple)
        else together(batches)
    )


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
        if on_gpu(device) and not on_gpu(value.device):
            # From pinned memory the host need not wait; its own, so that the user's may be written to meanwhile.
            return torch.empty_like(value, pin_memory=True).copy_(value).to(device, non_blocking=True)
        # A tensor made in inference mode cannot be part of a graph, but a copy can.
        return value.clone().to(device) if value.is_inference() else value.to(device)

    if isinstance(batch, Mapping):
        return {key: move(value) for key, value in batch.items()}
    if isinstance(batch, tuple):
        return tuple(move(value) for value in batch)
    if isinstance(batch, list):
        return [move(value) for value in batch]
    return move(batch)


def readings_of_batch(batch: Batch, where: str) -> list[Reading]:
    """How many values of each floating-point input are NaN or infinite; −inf in an `attention_mask` is none of them."""
    mask = arguments(batch)[1].get("attention_mask")

    def reading(index: int, value: Tensor) -> Reading:
        return Reading(
            count_not_finite(value.masked_fill(value == -torch.inf, 0) if value is mask else value),
            lambda count: (
                f"{where}: input tensor {index} of the batch (shape {tuple(value.shape)}) holds {count:.0f} values "
                "that are NaN or infinite. Nothing was computed from it."
            ),
        )

    return [reading(index, value) for index, value in enumerate(tensors(batch)) if value.is_floating_point()]


def check_finite(batch: Batch, where: str) -> None:
    """Raises NonFinite if an input holds NaN or infinity."""
    raise_first(readings_of_batch(batch, where))


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
            "The stream of batches is empty, or was used up before: expected at least one batch. A generator can be "
            "gone through once only; give a list of it, list(generator), or a DataLoader."
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
