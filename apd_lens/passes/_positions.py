"""Outputs of chosen positions: the last one of each example, or others, with padding left out of account."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from apd_lens._codec import saved
from apd_lens._errors import InvalidOutput, InvalidSetting, ShapeMismatch
from apd_lens.data._batch import Batch
from apd_lens.data._finite import on_gpu
from apd_lens.data._inputs import Inputs
from apd_lens.data._points import Valid
from apd_lens.passes._output import OfPositions


@saved
@dataclass(frozen=True)
class LastPosition(OfPositions):
    """What `last_position` makes."""

    def places(self, inputs: Inputs | None, valid: Valid, n_positions: int) -> Int[Tensor, "batch n"]:
        if valid is None:
            return torch.tensor([[n_positions - 1]])
        if not on_gpu(valid.device):  # which would have to be waited for
            _check_lengths(valid, 1)
        return n_positions - 1 - valid.flip(1).byte().argmax(1, keepdim=True)


@saved
@dataclass(frozen=True)
class Positions(OfPositions):
    """What `positions` makes.

    Attributes:
        indices: among the positions that are data, below 0 from the end.
        of_batch: takes their place where it is given.
    """

    indices: tuple[int, ...] = ()
    of_batch: Callable[[Batch], Any] | None = None

    def places(self, inputs: Inputs | None, valid: Valid, n_positions: int) -> Int[Tensor, "batch n"]:
        if self.of_batch is not None:
            if inputs is None:
                raise InvalidOutput("Where positions are a function of the batch, they are not known without it.")
            return _checked(self.of_batch(inputs.batch), inputs.n_examples, valid, n_positions)
        needed = max(index + 1 if index >= 0 else -index for index in self.indices)
        if valid is None:
            valid = torch.ones(1, n_positions, dtype=torch.bool)
        _check_lengths(valid, needed)
        indices = torch.tensor(self.indices, device=valid.device).expand(len(valid), -1)
        counts = valid.sum(1, keepdim=True)
        places = torch.where(indices < 0, counts + indices, indices)
        if bool((places.sort(1).values.diff(dim=1) == 0).any()):
            raise ShapeMismatch(f"positions{self.indices} are one and the same in an example of this batch.")
        valid_first = (~valid).byte().argsort(dim=1, stable=True)
        return valid_first.gather(1, places)


def last_position() -> LastPosition:
    """An `output=` that is the logits at the last position of each example, `batch n_outputs`.

    The last position is the last one that is data. A batch may have padding on the right, on the left, or none; its
    mask of attention says so, or `valid=` does. Where a Hugging Face model can make the logits of some positions alone
    (`logits_to_keep`), it makes those. A decomposition that was made with this output is loaded without `output=`.

    >>> last_position()(torch.arange(12.0).view(2, 3, 2))
    tensor([[ 4.,  5.],
            [10., 11.]])
    """
    return LastPosition()


def positions(*where: Any) -> Positions:
    """An `output=` that is the logits at chosen positions of each example.

    It is `batch n n_outputs` for n positions, and `batch n_outputs` for one.

    Args:
        where: whole numbers, or one tensor or list of them: indices among the positions of an example that are data,
            below 0 from the end. Or one function of the batch, as the model is called with it, that returns integers
            `batch` or `batch n`: positions counted from the start of the row. A function is not saved with a
            decomposition.

    Raises:
        InvalidSetting: no such indices, or one of them twice.

    >>> positions(0, -1)(torch.arange(6.0).view(1, 3, 2))
    tensor([[[0., 1.],
             [4., 5.]]])
    """
    if len(where) == 1 and callable(where[0]) and not isinstance(where[0], Tensor):
        return Positions(of_batch=where[0])
    indices: list[Any] = []
    for item in where:
        item = item.tolist() if isinstance(item, Tensor) else item
        indices += item if isinstance(item, Iterable) else [item]
    are_numbers = all(isinstance(index, int) and not isinstance(index, bool) for index in indices)
    if not indices or not are_numbers or len(set(indices)) != len(indices):
        raise InvalidSetting(f"Expected distinct whole numbers, or one function of the batch, got positions{where}.")
    return Positions(tuple(indices))


def _check_lengths(valid: Tensor, needed: int) -> None:
    if (shortest := int(valid.sum(1).min())) < needed:
        raise ShapeMismatch(
            f"The explained output needs {needed} positions that are data in each example, and one has {shortest}. "
            "Leave it out of the batch, or choose other positions."
        )


def _checked(places: Any, n_examples: int, valid: Valid, n_positions: int) -> Int[Tensor, "batch n"]:
    """What a user's function gives."""
    if not isinstance(places, Tensor) or places.dtype != torch.long or places.shape[:1] != (n_examples,):
        came = f"{places.dtype} of {tuple(places.shape)}" if isinstance(places, Tensor) else type(places).__name__
        raise ShapeMismatch(
            f"Expected the function given to positions() to return int64 of shape ({n_examples},) or ({n_examples}, n),"
            f" got {came}."
        )
    places = places.reshape(n_examples, -1)
    fits = bool(((places >= 0) & (places < n_positions)).all())
    if not fits or (valid is not None and not bool(valid.gather(1, places.to(valid.device)).all())):
        raise ShapeMismatch(
            f"The function given to positions() returns positions that are padding, or not among the {n_positions} of "
            "a row."
        )
    if bool((places.sort(1).values.diff(dim=1) == 0).any()):
        raise ShapeMismatch("The function given to positions() returns one position of an example twice.")
    return places
