"""The explained output: what is picked from the model's return value, and its checks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from apd_lens._errors import InvalidOutput, ShapeMismatch
from apd_lens.data._inputs import Inputs
from apd_lens.data._points import GIVE_VALID, padded

# Picks the tensor `batch *pos n_outputs` that is explained from the model's return value.
OutputFn = Callable[[Any], Any]


def default_output(value: Any) -> Any:
    """A tensor as it is, `.logits` of a Hugging Face output."""
    return getattr(value, "logits", value)


def explained_output(output: OutputFn, value: Any, inputs: Inputs) -> Tensor:
    """What `output` picks from the model's return value, checked.

    Raises:
        InvalidOutput: no floating-point tensor.
        ShapeMismatch: not `batch *pos n_outputs` with the batch's number of examples; or its positions are not those of
            the padding, and depend on some of it.
    """
    picked = output(value)
    if not isinstance(picked, Tensor) or not picked.is_floating_point():
        came = f"a tensor of {picked.dtype}" if isinstance(picked, Tensor) else type(picked).__name__
        raise InvalidOutput(
            f"Expected the model's output to be a floating-point tensor, got {came}. Give output=, a function that "
            "picks the tensor to explain from what the model returns, such as output=lambda out: out[0]."
        )
    if inputs.main_axes == 1 and (picked.ndim != 2 or len(picked) != inputs.n_examples):
        raise no_batch_axis(inputs.n_examples, f"the output is {tuple(picked.shape)}")
    if picked.ndim < 2 or len(picked) != inputs.n_examples:
        raise ShapeMismatch(
            f"Expected an output of shape (batch, *pos, n_outputs) with {inputs.n_examples} examples, got "
            f"{tuple(picked.shape)}. Give output=, a function that picks such a tensor from what the model returns."
        )
    valid = inputs.valid
    if valid is not None and padded(picked, valid) is None and _explains_padding(picked, value, valid):
        raise ShapeMismatch(
            f"The explained output is {tuple(picked.shape)}, and the batch has padding among its {valid.shape[1]} "
            f"positions: which of these the output is of cannot be told, or some of them are padding. To explain the "
            f"last position, pad on the left, or pick the last position that is data. Otherwise {GIVE_VALID}."
        )
    return picked


def _explains_padding(picked: Tensor, value: Any, valid: Tensor) -> bool:
    """Whether an output of other positions than the padding's may have been picked from padding."""
    whole = default_output(value)
    if not isinstance(whole, Tensor) or padded(whole, valid) is None:
        return picked.ndim > 2 and not bool(valid.all())
    if picked.grad_fn is None or not whole.requires_grad:
        return False
    weights = torch.linspace(1, 2, picked.numel(), dtype=picked.dtype, device=picked.device).view_as(picked)
    (gradient,) = torch.autograd.grad(picked, whole, weights, retain_graph=True, allow_unused=True)
    return gradient is not None and bool(gradient[~valid].any())


def no_batch_axis(length: int, came: str) -> ShapeMismatch:
    return ShapeMismatch(
        f"The batch's input has one axis, of {length} examples, but {came}. If it is one example, give it a batch "
        "axis: x[None]."
    )
