"""Padding: positions that a batch's mask of attention leaves out. They are no data points.

`valid` is False there, and None where every position is data. Only values `batch pos *rest` have padding.

A mask `batch pos` is of 1 and 0 or, where no number in it is above 0, of what is added to attention scores. A mask
`batch *heads query key`, or `query key` for all examples, may keep several documents in one row apart. There, padding
is what a mask `batch pos` would have made it: positions that none attends to, not even themselves. Padding that attends
to itself cannot be told from a document of one position, and counts as such.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from apd_lens._errors import ShapeMismatch

Valid = Bool[Tensor, "batch pos"] | None

# No attention is paid where so little is added to a score. Hosts add -10,000, or the least number there is.
_NEVER = -1000.0

GIVE_VALID = (
    "give valid=, a function of the batch that returns which positions of the explained output are data, as bool of "
    "shape (batch, pos)"
)

# What a data point is: an example, or each position of an example.
Granularity = Literal["example", "position"]


def attended(mask: Tensor, examples: int, main: Tensor | None) -> Bool[Tensor, "batch query key"] | None:
    """Whether a query attends to a key in any head; None for a mask that is not of queries and keys.

    Args:
        main: what the mask may be about, `batch pos *rest`; None where a mask of two axes is surely `batch pos`.

    Raises:
        ShapeMismatch: it cannot be told what the mask says.
    """
    if mask.ndim < 2 or (mask.ndim == 2 and not _is_of_pairs(mask, examples, main)):
        return None
    attends = mask > _NEVER if mask.is_floating_point() else mask.bool()
    attends = attends[None] if mask.ndim == 2 else attends
    attends = attends.flatten(1, -3).any(1) if mask.ndim > 3 else attends
    if len(attends) not in (1, examples):
        raise _unclear(f"Its first axis is {len(attends)}, not one or {examples} examples", mask)
    return attends.expand(examples, -1, -1)


def kept_positions(mask: Tensor, examples: int) -> Bool[Tensor, "batch pos"]:
    """True where a mask `batch pos` leaves a position in."""
    kept = mask.bool()
    if mask.is_floating_point():
        is_added = (mask < 0).any() | ~(mask > 0).any()
        kept = torch.where(is_added, mask > _NEVER, mask != 0)
    return kept.expand(examples, -1)


def _is_of_pairs(mask: Tensor, examples: int, main: Tensor | None) -> bool:
    """Whether a mask of two axes is of queries and keys, for all examples, and not of examples and positions.

    Where there are as many examples as positions, what is in it may tell: a position attends to itself, unless to
    none; and tokenizers give integers, with padding on one side.
    """
    rows, columns = mask.shape
    if rows not in (1, examples):
        if rows == columns:
            return True
        raise _unclear(f"Its first axis is {rows}, not {examples} examples", mask)
    if rows != columns or main is None or main.ndim < 2 or main.shape[1] != columns:
        return False
    kept = kept_positions(mask, rows)
    one_side = (kept[:, 1:] != kept[:, :-1]).sum(1) <= 1
    if not (kept.diagonal() | ~(kept.any(0) | kept.any(1))).all() or bool(kept.all()):
        return False
    if not mask.is_floating_point() and mask.dtype != torch.bool and one_side.all() and not kept.equal(kept.tril()):
        return False
    raise _unclear("With as many examples as positions it may be of examples, or of queries and keys", mask)


def _unclear(reason: str, mask: Tensor) -> ShapeMismatch:
    return ShapeMismatch(
        f"It cannot be told what the attention mask of shape {tuple(mask.shape)} says of padding. {reason}. Give it as "
        f"`batch 1 query key`. Or: {GIVE_VALID}."
    )


def lengths_of_documents(attends: Bool[Tensor, "batch query key"]) -> Int[Tensor, "batch pos"] | None:
    """For each position, the number of data positions in its document; None where queries are others than keys.

    A document ends where no attention goes over to what comes after, in either direction.
    """
    if attends.shape[1] != attends.shape[2]:
        return None
    valid = attends.any(1)
    own = torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
    linked = ((attends | attends.mT) & valid[:, None] & valid[:, :, None]) | own
    first_linked = linked.byte().argmax(-1)
    first_from_here_on = first_linked.flip(1).cummin(1).values.flip(1)
    document = (first_from_here_on == torch.arange(len(own), device=valid.device)).cumsum(1) - 1
    return torch.zeros_like(document).scatter_add_(1, document, valid.long()).gather(1, document)


def padded(values: Tensor, valid: Valid) -> Valid:
    """`valid`, on the device of values `batch pos *rest`, if it is about their positions; else None."""
    is_about = valid is not None and values.ndim > 2 and values.shape[:2] == valid.shape
    return valid.to(values.device) if is_about else None  # type: ignore[union-attr]


def zero_at_padding(values: Shaped[Tensor, "batch *rest"], valid: Valid) -> Shaped[Tensor, "batch *rest"]:
    """The values with zeros at padding."""
    valid = padded(values, valid)
    return values if valid is None else values.masked_fill(~valid.reshape(*valid.shape, *[1] * (values.ndim - 2)), 0)


def without_padding(values: Shaped[Tensor, "batch *rest"], valid: Valid) -> Shaped[Tensor, "..."]:
    """The values of the valid positions, `data *rest`."""
    valid = padded(values, valid)
    return values if valid is None else values[valid]


def one_row(values: Float[Tensor, "batch *pos"], valid: Valid) -> Float[Tensor, " data"]:
    """One value of each data point, in one row; those at padding left out."""
    return values[valid.to(values.device)] if valid is not None and values.shape == valid.shape else values.flatten()


def mean_over_positions(values: Float[Tensor, "batch *pos"], valid: Valid) -> Float[Tensor, " batch"]:
    """Of each example, its padding not counted."""
    if valid is not None and values.shape == valid.shape:
        valid = valid.to(values.device)
        return values.masked_fill(~valid, 0).sum(1) / valid.sum(1).clamp_min(1)
    return values.reshape(len(values), -1).mean(1)
