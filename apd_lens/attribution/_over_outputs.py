"""Means over outputs, and the position axes that calls share."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from apd_lens._errors import ShapeMismatch
from apd_lens.data._points import zero_at_padding
from apd_lens.passes._watch import Call, WatchedPass


def root_mean(
    squares: Float[Tensor, "examples *pos C"], watched: WatchedPass, examples: slice = slice(None)
) -> Float[Tensor, "examples *pos C"]:
    """Root of the mean over outputs of what was summed over them, for some examples of the pass."""
    return mean_over_outputs(squares, watched, examples).sqrt()


def mean_over_outputs(
    squares: Float[Tensor, "examples *pos C"], watched: WatchedPass, examples: slice = slice(None)
) -> Float[Tensor, "examples *pos C"]:
    squares = squares.to(watched.output.device)
    if squares.ndim > 2:
        watched.check_padding_of_positions()
    n_outputs = watched.n_outputs(torch.Size([len(watched.output), *squares.shape[1:-1]]))[examples].to(squares)
    n_outputs = n_outputs.reshape(*n_outputs.shape, *[1] * (squares.ndim - n_outputs.ndim))
    return zero_at_padding(squares / n_outputs, None if watched.valid is None else watched.valid[examples])


def sum_of_squares(effects: Float[Tensor, "v *data C"]) -> Float[Tensor, "*data C"]:
    """Over v; in place where nothing else needs the effects."""
    return (effects.square() if effects.requires_grad else effects.square_()).sum(0)


def shared_positions(calls: Sequence[Call]) -> torch.Size:
    """The position axes of all calls.

    Raises:
        ShapeMismatch: they differ.
    """
    first, *others = calls
    for call in others:
        if call.y.shape[1:-1] != first.y.shape[1:-1]:
            raise ShapeMismatch(
                f"With positions as data points every decomposed matrix must be used on the same positions, but "
                f"{call.use.matrix} was used on {tuple(call.y.shape[:-1])} (batch *pos) and the ones before it on "
                f"{tuple(first.y.shape[:-1])}. Decompose them separately, or use granularity='example'."
            )
    return first.y.shape[1:-1]
