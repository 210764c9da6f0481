"""Batches: what a model is called with."""

import copy
import inspect
import weakref
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apd_lens._errors import InvalidBatches
from apd_lens._processes import check_same, n_processes
from apd_lens.data._finite import Reading, on_gpu

# A tensor, a tuple or list of tensors (positional arguments), a mapping (keyword arguments), or whatever else the
# model takes as its one argument (a list of strings for a HookedTransformer with a tokenizer).
Batch = Any

# Of an argument: its name, or its place.
Key = str | int


def arguments(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the call `model(*args, **kwargs)`."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if _is_positional(batch) else (batch,)), {}


def _is_positional(batch: Batch) -> bool:
    """Whether a batch is a sequence of positional arguments; one of texts is a single argument."""
    if isinstance(batch, list):
        return bool(batch) and all(isinstance(item, Tensor) for item in batch)
    return isinstance(batch, tuple) and not are_texts(batch)


def are_texts(value: Any) -> bool:
    """Whether a value is a list or tuple of strings."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, str) for item in value)


def mapped(batch: Batch, change: Callable[[Key, Any], Any]) -> Batch:
    """The batch with change(key, argument) in the place of each argument; the key is its name, or its place."""
    if isinstance(batch, Mapping):
        return {key: change(key, value) for key, value in batch.items()}
    if _is_positional(batch):
        values = [change(place, value) for place, value in enumerate(batch)]
        return batch._make(values) if hasattr(batch, "_make") else type(batch)(values)
    return change(0, batch)


def call(model: nn.Module, batch: Batch, **further: Any) -> Any:
    """The model's return value on a batch, with further keyword arguments. A cache among the arguments is copied, since
    models append to it."""
    args, kwargs = arguments(mapped(batch, lambda _, value: changed_within(value, Tensor.clone)))
    kwargs |= further
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


def check_same_batch(batch: Batch, where: str) -> None:
    """Raises InvalidBatches if other processes were given another batch. Waits for what is on a GPU."""
    if n_processes() == 1:
        return
    seen = [
        (key, value.shape, value.dtype, _checksum(value))
        if isinstance(value, Tensor)
        else (key, are_texts(value) and value)
        for key, value in _items(batch)
    ]
    check_same(
        seen,
        InvalidBatches(
            f"{where}: the processes were given different batches. All must be given the same, of which each takes its "
            "part of the examples: seed what shuffles, DataLoader(…, generator=torch.Generator().manual_seed(0)), and "
            "give a DataLoader without a DistributedSampler that accelerate has not prepared."
        ),
    )


def _checksum(values: Tensor) -> int:
    """A number that changes with the numbers of an example, and with the order of the examples."""
    bits = values.detach().contiguous()
    bits = bits.view({2: torch.int16, 4: torch.int32, 8: torch.int64}.get(values.element_size(), torch.uint8))
    rows = bits.reshape(len(values) if values.ndim else 1, -1).sum(1, dtype=torch.int64)
    return int((rows * torch.arange(1, len(rows) + 1, device=rows.device)).sum())


def holds_tensors(value: Any) -> bool:
    """Whether a value is no tensor, but an object with tensors in it, such as a key-value cache."""
    return not isinstance(value, Tensor) and bool(tensors_within(value))


def changed_within(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of an object that holds tensors, with change(tensor) in the place of each; all else as it is."""
    if isinstance(value, Tensor) or not (held := tensors_within(value)):
        return value
    return copy.deepcopy(value, {id(tensor): change(tensor.detach()) for tensor in held})


def tensors_within(value: Any, visited: set[int] | None = None) -> list[Tensor]:
    """A tensor itself, and those that an object holds. Those in objects that were visited are left out."""
    visited = set() if visited is None else visited
    if isinstance(value, Tensor):
        return [value]
    if id(value) in visited or isinstance(value, nn.Module | type | str):
        return []
    visited.add(id(value))
    if isinstance(value, Mapping):
        inside = list(value.values())
    elif isinstance(value, list | tuple | set):
        inside = list(value)
    else:
        inside = list(getattr(value, "__dict__", {}).values())
    return [tensor for item in inside for tensor in tensors_within(item, visited)]


def same_but_for_examples(batch: Batch, of_examples: Container[Key]) -> Hashable:
    """Equal for batches of one example each that `joined` can join: alike in all that an example does not change."""

    def of_argument(key: Key, value: Any) -> Hashable:
        if holds_tensors(value):
            return id(value)
        if key in of_examples:
            return (value.shape, value.dtype) if isinstance(value, Tensor) else type(value)
        return value if isinstance(value, Hashable) and not isinstance(value, Tensor) else id(value)

    args, kwargs = arguments(batch)
    return tuple((key, of_argument(key, value)) for key, value in [*enumerate(args), *kwargs.items()])


def joined(batches: Sequence[Batch], of_examples: Container[Key]) -> Batch:
    """Several batches of one example each, as one; they are alike by `same_but_for_examples`.

    Args:
        of_examples: keys of the arguments that have an entry for each example.

    >>> joined([(torch.tensor([[1]]), 0.5), (torch.tensor([[2]]), 0.5)], {0})
    (tensor([[1],
            [2]]), 0.5)
    """
    first = batches[0]

    def together(values: Sequence[Any]) -> Any:
        if len(values) == 1 or holds_tensors(values[0]):
            return values[0]
        if isinstance(values[0], Tensor):
            return torch.cat(list(values))
        return type(values[0])(item for value in values for item in value)

    each = [dict(enumerate(args)) | kwargs for args, kwargs in map(arguments, batches)]
    return mapped(first, lambda key, value: together([values[key] for values in each]) if key in of_examples else value)


@dataclass(frozen=True)
class Kept:
    """A batch, and what its tensors held.

    Attributes:
        ids: which objects its arguments were.
        values: its arguments; tensors by weak references, since they are the user's.
        copies: of its tensors.
        versions: for each, how often it was changed in place; None where torch does not count (inference mode).
    """

    ids: tuple[int, ...]
    values: dict[Key, Any]
    copies: list[Tensor]
    versions: list[int | None]

    @staticmethod
    def of(batch: Batch) -> "Kept":
        values = {key: weakref.ref(value) if isinstance(value, Tensor) else value for key, value in _items(batch)}
        return Kept(ids_of(batch), values, [value.detach().clone() for value in tensors(batch)], _versions(batch))

    @property
    def is_alive(self) -> bool:
        """Whether the user still has all its tensors."""
        return all(value() is not None for value in self.values.values() if isinstance(value, weakref.ref))

    def is_same(self, batch: Batch) -> bool:
        """Whether a batch is made of the very same objects, and they hold the same.

        Torch does not count all changes in place (numpy's, those of `.data`), so numbers are compared; on a GPU, which
        would have to be waited for, `changes` says it late.
        """
        now = dict(_items(batch))
        return (
            now.keys() == self.values.keys()
            and all(value is _referred(self.values[key]) for key, value in now.items())
            and not any(map(holds_tensors, now.values()))  # which anybody may change
            and _versions(batch) == self.versions
            and None not in self.versions
            and all(now.shape == before.shape for now, before in self._pairs(batch))
            and all(torch.equal(*pair) for pair in self._pairs(batch) if not on_gpu(pair[0].device))
        )

    def changes(self, batch: Batch) -> list[Reading]:
        """How many numbers on a GPU changed in the same batch all the same."""

        def message(count: float) -> str:
            return (
                f"{count:.0f} numbers of the batch were changed in place on the GPU where torch does not count it "
                "(through .data). Give a new tensor for every batch, or fill it by copy_."
            )

        pairs = [pair for pair in self._pairs(batch) if on_gpu(pair[0].device)]
        return [Reading((now != before).sum(), message, InvalidBatches) for now, before in pairs]

    def _pairs(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        return list(zip(tensors(batch), self.copies, strict=True))


def ids_of(batch: Batch) -> tuple[int, ...]:
    """Which objects the arguments are."""
    return tuple(id(value) for _, value in _items(batch))


def _items(batch: Batch) -> list[tuple[Key, Any]]:
    args, kwargs = arguments(batch)
    return [*enumerate(args), *kwargs.items()]


def _referred(value: Any) -> Any:
    return value() if isinstance(value, weakref.ref) else value


def _versions(batch: Batch) -> list[int | None]:
    return [None if value.is_inference() else value._version for value in tensors(batch)]


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

    return mapped(batch, lambda _, value: move(value))
