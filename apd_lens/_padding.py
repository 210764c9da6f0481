"""Padding: positions that a batch's keyword argument `attention_mask` marks with 0. They are no data points.

`real` is True elsewhere, and None where a batch has no attention_mask. Only values `batch pos *rest` have padding.

A mask `batch *heads query key` (bool, or numbers that are added to attention scores) may keep several documents in one
row apart. There, padding is what a mask `batch pos` would have made it: positions that none attends to, not even
themselves. Padding that attends to itself cannot be told from a document of one position, and counts as such.
"""

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from apd_lens._batches import Batch, arguments, n_examples

Real = Bool[Tensor, "batch pos"] | None

# No attention is paid where so little is added to a score. Hosts add -10,000, or the least number there is.
_NEVER = -1000.0


def real_positions(batch: Batch) -> Real:
    """True where a position is no padding."""
    attention_mask = arguments(batch)[1].get("attention_mask")
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        return attention_mask.bool()
    attends = _attends(batch)
    return None if attends is None else attends.any(1)


def document_lengths(batch: Batch) -> Int[Tensor, "batch pos"] | None:
    """For each position, the number of real positions in its document; None without a mask of queries and keys.

    A document ends where no attention goes over to what comes after, in either direction.
    """
    attends = _attends(batch)
    if attends is None or attends.shape[1] != attends.shape[2]:
        return None
    real = attends.any(1)
    own = torch.eye(real.shape[1], dtype=torch.bool, device=real.device)
    linked = ((attends | attends.mT) & real[:, None] & real[:, :, None]) | own
    first_linked = linked.byte().argmax(-1)
    first_from_here_on = first_linked.flip(1).cummin(1).values.flip(1)
    document = (first_from_here_on == torch.arange(len(own), device=real.device)).cumsum(1) - 1
    return torch.zeros_like(document).scatter_add_(1, document, real.long()).gather(1, document)


def _attends(batch: Batch) -> Bool[Tensor, "batch query key"] | None:
    """Whether a query attends to a key in any head; None where the batch has no such mask."""
    mask = arguments(batch)[1].get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim < 3:
        return None
    attends = mask > _NEVER if mask.is_floating_point() else mask.bool()
    attends = attends.flatten(1, -3).any(1) if attends.ndim > 3 else attends
    examples = n_examples(batch)
    return attends.expand(examples, -1, -1) if len(attends) in (1, examples) else None


def padded(values: Tensor, real: Real) -> Real:
    """`real`, if it is about the positions of values `batch pos *rest`; else None."""
    return real if real is not None and values.ndim > 2 and values.shape[:2] == real.shape else None


def zero_at_padding(values: Shaped[Tensor, "batch *rest"], real: Real) -> Shaped[Tensor, "batch *rest"]:
    """The values with zeros at padding."""
    real = padded(values, real)
    return values if real is None else values.masked_fill(~real.reshape(*real.shape, *[1] * (values.ndim - 2)), 0)


def without_padding(values: Shaped[Tensor, "batch *rest"], real: Real) -> Shaped[Tensor, "..."]:
    """The values of the real positions, `data *rest`."""
    real = padded(values, real)
    return values if real is None else values[real]


def one_row(values: Float[Tensor, "batch *pos"], real: Real) -> Float[Tensor, " data"]:
    """One value of each data point, in one row; those at padding left out."""
    return values[real] if real is not None and values.shape == real.shape else values.flatten()


def mean_over_positions(values: Float[Tensor, "batch *pos"], real: Real) -> Float[Tensor, " batch"]:
    """Of each example, its padding not counted."""
    if real is not None and values.shape == real.shape:
        return (values * real).sum(1) / real.sum(1).clamp_min(1)
    return values.reshape(len(values), -1).mean(1)
