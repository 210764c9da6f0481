"""Padding: positions that a batch's keyword argument `attention_mask` marks with 0. They are no data points.

`real` is True elsewhere, and None where a batch has no attention_mask. Only values `batch pos *rest` have padding.
"""

from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from apd_lens._batches import Batch, arguments

Real = Bool[Tensor, "batch pos"] | None


def real_positions(batch: Batch) -> Real:
    """True where a position is no padding."""
    attention_mask = arguments(batch)[1].get("attention_mask")
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        return attention_mask.bool()
    return None


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
