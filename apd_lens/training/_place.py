"""Where a training is in its data: what tells the data from others, and how to get to the same place again."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from apd_lens._errors import ApdWarning, InvalidBatches
from apd_lens.data._batch import Batch
from apd_lens.data._stream import stream
from apd_lens.training._seen import digest_of
from apd_lens.training._state import Batches

# Of a list so many batches are looked at, spread evenly.
LOOKED_AT = 64


@runtime_checkable
class Stateful(Protocol):
    """Batches that know where they are, such as torchdata's StatefulDataLoader."""

    def __iter__(self) -> Iterator[Batch]: ...

    def state_dict(self) -> dict[str, Any]:
        """Where it is: mappings, lists, tuples, tensors, strings, numbers, None."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Place:
    """A place in a stream of batches.

    Attributes:
        fitted: how many batches the start of the components drew.
        listed: of a list, its length and digests of batches in it.
        digests: step -> digest of its batch, of the first step and of the last one that was looked at.
        loader: the state of a loader that has one, as JSON, with the numbers of its tensors.
        tensors: of the loader's state.
        at: the step before which the loader had that state.
    """

    fitted: int = 0
    listed: list[Any] | None = None
    digests: dict[str, str] = field(default_factory=dict)
    loader: Any = None
    tensors: list[Tensor] = field(default_factory=list)
    at: int = 0

    def after(self, batches: Batches, step: int, batch: Batch) -> "Place":
        """The place behind a step, which had this batch and was just done."""
        first = {number: digest for number, digest in self.digests.items() if number == "0"}
        place = replace(self, digests=first | {str(step): digest_of(batch)})
        if not isinstance(batches, Stateful):
            return place
        tensors: list[Tensor] = []
        return replace(place, loader=_packed(batches.state_dict(), tensors), tensors=tensors, at=step + 1)


def start_of(batches: Batches, fitted: int = 0) -> Place:
    """The place before the first step."""
    if not isinstance(batches, Sequence):
        return Place(fitted)
    looked_at = batches[:: 1 + len(batches) // LOOKED_AT]
    return Place(fitted, [len(batches), *map(digest_of, looked_at)])


def can_be_found_again(batches: Batches) -> bool:
    """Whether a later process can get to the same place: not in a generator."""
    return not isinstance(batches, Iterator) or isinstance(batches, Stateful)


def stream_from(place: Place, batches: Batches, step: int, name: str) -> Iterator[Batch]:
    """The batches from a step on, without end. Those before it are drawn and passed over, or a loader's state is put
    back.

    Args:
        name: of the argument, for messages.

    Raises:
        InvalidBatches: other batches than those of the place, or a generator.
    """
    if step and not can_be_found_again(batches):
        raise InvalidBatches(
            f"A training is resumed at step {step}, and {name} is a {type(batches).__name__}, which gives each batch "
            "once and cannot be brought to that place. Give a list, a DataLoader, a function step -> batch, or an "
            "iterable with state_dict and load_state_dict (torchdata's StatefulDataLoader)."
        )
    if place.listed is not None and isinstance(batches, Sequence):
        _check_list(place.listed, start_of(batches).listed or [], name)
    if not isinstance(batches, Iterable):
        for number, digest in place.digests.items():
            _check(digest, batches(int(number)), number, name)
        return stream(batches, step)
    done, drawn = 0, stream(batches)
    if place.loader is not None and isinstance(batches, Stateful):
        batches.load_state_dict(_unpacked(place.loader, place.tensors))
        done, drawn = place.at, _from_state(batches, name)
    for number in map(str, range(done, step)):
        batch = next(drawn)
        if number in place.digests:
            _check(place.digests[number], batch, number, name)
    return drawn


def _from_state(batches: Stateful, name: str) -> Iterator[Batch]:
    """The rest of the pass that a loader was in, and then further passes, without end."""
    yield from batches
    warnings.warn(
        f"{name} was put back by its load_state_dict, and begins another pass now. Whether that has the order that it "
        "would have had is the loader's to know: torchdata's StatefulDataLoader does not keep the shuffling of further "
        "passes. A DataLoader without a state_dict is gone through instead, and then it is the same.",
        ApdWarning,
        stacklevel=2,
    )
    yield from stream(batches)


def _check(expected: str, batch: Batch, step: str, name: str) -> None:
    if digest_of(batch) != expected:
        raise InvalidBatches(
            f"The batch that {name} gives for step {step} is another one than that which was trained on. Give the data "
            "in the order that they had. A DataLoader that shuffles needs generator=torch.Generator().manual_seed(…), "
            "made anew in each process."
        )


def _check_list(expected: list[Any], came: list[Any], name: str) -> None:
    if expected[0] != came[0]:
        raise InvalidBatches(
            f"{name} was a list of {expected[0]} batches when the checkpoint was made, and has {came[0]} now. Give the "
            "same ones, or start anew."
        )
    differing = [place for place, pair in enumerate(zip(expected[1:], came[1:], strict=True)) if len(set(pair)) > 1]
    if differing:
        every = 1 + expected[0] // LOOKED_AT
        raise InvalidBatches(
            f"{len(differing)} of the {len(came) - 1} batches of {name} that were compared are not what they were when "
            f"the checkpoint was made, the first of them {name}[{every * differing[0]}]. Give the same ones, or start "
            "anew."
        )


def _packed(value: Any, tensors: list[Tensor]) -> Any:
    """A loader's state as JSON can hold it, with copies of its tensors beside it."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        tensors.append(value.detach().clone())
        return {"tensor": len(tensors) - 1}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_packed(item, tensors) for item in value]}
    if isinstance(value, Mapping):
        return {"mapping": [[_packed(key, tensors), _packed(item, tensors)] for key, item in value.items()]}
    raise InvalidBatches(
        f"The state_dict of the batches holds a {type(value).__name__}, which cannot be written to a checkpoint. It "
        "may hold mappings, lists, tuples, tensors, strings, bytes, numbers and None."
    )


def _unpacked(value: Any, tensors: Sequence[Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inside),) = value.items()
    if kind == "tensor":
        return tensors[inside].clone()
    if kind == "bytes":
        return bytes.fromhex(inside)
    if kind == "mapping":
        return {_unpacked(key, tensors): _unpacked(item, tensors) for key, item in inside}
    items = [_unpacked(item, tensors) for item in inside]
    return tuple(items) if kind == "tuple" else items
