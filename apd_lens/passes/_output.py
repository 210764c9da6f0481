"""The explained output: what is picked from the model's return value, and its checks."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from apd_lens._errors import InvalidOutput, ShapeMismatch
from apd_lens.data._batch import arguments, call
from apd_lens.data._inputs import Inputs
from apd_lens.data._points import GIVE_VALID, Valid, padded
from apd_lens.host._target import TargetModel

# Picks the tensor `batch *pos n_outputs` that is explained from the model's return value.
OutputFn = Callable[[Any], Any]


def default_output(value: Any) -> Any:
    """A tensor as it is, `.logits` of a Hugging Face output."""
    return getattr(value, "logits", value)


def everywhere(output: OutputFn) -> OutputFn:
    """The same output at all positions, where it is one of some."""
    return getattr(output, "everywhere", output)


class OfPositions:
    """An output that knows the batch's padding: the logits at some positions of each example.

    It is `batch n n_outputs` for n positions, and `batch n_outputs` for one.

    Attributes:
        everywhere: the output at all positions.
    """

    everywhere = staticmethod(default_output)

    def places(self, inputs: Inputs | None, valid: Valid, n_positions: int) -> Int[Tensor, "batch n"]:
        """The positions, counted from the start of the row; one row of them where all examples share them.

        Args:
            inputs: None where a model's return value is all that is known.
            valid: which of the `n_positions` are data; None for all.
        """
        raise NotImplementedError

    def __call__(self, value: Any) -> Float[Tensor, "batch *n n_outputs"]:
        """Of a model's return value alone: as if no position were padding."""
        logits = default_output(value)
        return logits_at(logits, self.places(None, None, logits.shape[1]))


def logits_at(
    logits: Float[Tensor, "batch pos n_outputs"], places: Int[Tensor, "batch_or_one n"]
) -> Float[Tensor, "batch *n n_outputs"]:
    """The logits at n positions of each example; without their axis for one."""
    examples = torch.arange(len(logits), device=logits.device)[:, None]
    picked = logits[examples, places.to(logits.device)]
    return picked[:, 0] if picked.shape[1] == 1 else picked


def explained_call(
    target: TargetModel, names: Iterable[str], output: OutputFn, inputs: Inputs, hidden: Iterable[str] = ()
) -> Tensor:
    """Calls the model, as it is at the moment, with a batch, and picks the explained output.

    Where the output is one of positions, and the host can, it makes the logits of these positions alone.

    Args:
        names: of the matrices that are decomposed.
        hidden: names of submodules whose activations are looked at.

    Raises as `explained_output` does.
    """
    model = target.model
    if not isinstance(output, OfPositions) or not _takes_positions(target, names, inputs, hidden):
        return explained_output(output, call(model, inputs.batch), inputs)
    main = inputs.main
    assert main is not None
    n_positions = main.shape[1]
    places = output.places(inputs, _valid_of(inputs, n_positions), n_positions).to(main.device)
    kept = places.unique()  # as a tensor: of a number, the host makes a slice that is slow to multiply
    logits = default_output(call(model, inputs.batch, logits_to_keep=kept))
    if logits.shape[1] != len(kept):
        raise InvalidOutput(
            f"{type(model).__name__} was asked for the logits of {len(kept)} positions, and made those of "
            f"{logits.shape[1]}. Give output=, a function that picks the tensor to explain from what it returns."
        )
    return _checked(logits_at(logits, torch.searchsorted(kept, places)), inputs)


def _takes_positions(target: TargetModel, names: Iterable[str], inputs: Inputs, hidden: Iterable[str]) -> bool:
    """Whether the model can make the logits of some positions alone, and nothing looks at the others."""
    model: Any = target.model
    if not _makes_logits_of_positions(type(model)) or getattr(model.config, "is_encoder_decoder", False):
        return False
    args, kwargs = arguments(inputs.batch)
    if inputs.main is None or inputs.main_axes < 2 or len(args) > 1:
        return False
    if kwargs.get("labels") is not None or "logits_to_keep" in kwargs:
        return False
    head = model.get_output_embeddings()
    paths = {path for path, module in model.named_modules(remove_duplicate=False) if module is head}
    looked_at = {use.site for name in names for use in target.weights[name].uses} | set(hidden)
    return head is not None and not paths & looked_at


@functools.lru_cache(maxsize=64)
def _makes_logits_of_positions(cls: type[nn.Module]) -> bool:
    """Whether this is a class of Hugging Face's whose forward has `logits_to_keep`, and takes a tensor there."""
    try:
        parameter = inspect.signature(cls.forward).parameters.get("logits_to_keep")
    except (TypeError, ValueError):
        return False
    known = hasattr(cls, "get_output_embeddings") and hasattr(cls, "main_input_name")
    return known and parameter is not None and "Tensor" in str(parameter.annotation)


def _valid_of(inputs: Inputs, n_positions: int) -> Valid:
    """Which of an output's positions are data."""
    valid = inputs.valid
    if valid is not None and valid.shape[1] != n_positions:
        raise ShapeMismatch(
            f"The model's output has {n_positions} positions, and the batch's mask has {valid.shape[1]}, so it cannot "
            f"be told which of them are data. Leave logits_to_keep out of the batch: an output of positions gives it "
            f"to the model by itself. Otherwise {GIVE_VALID}."
        )
    return valid


def explained_output(output: OutputFn, value: Any, inputs: Inputs) -> Tensor:
    """What `output` picks from the model's return value, checked.

    Raises:
        InvalidOutput: no floating-point tensor.
        ShapeMismatch: not `batch *pos n_outputs` with the batch's number of examples; or its positions are not those of
            the padding, and depend on some of it.
    """
    if isinstance(output, OfPositions):
        logits = default_output(value)
        if not isinstance(logits, Tensor) or logits.ndim != 3 or len(logits) != inputs.n_examples:
            came = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ShapeMismatch(
                f"An output of positions needs logits of shape (batch, pos, n_outputs) with {inputs.n_examples} "
                f"examples, got {came}. Give output=, a function that picks a tensor from what the model returns."
            )
        valid = _valid_of(inputs, logits.shape[1])
        return _checked(logits_at(logits, output.places(inputs, valid, logits.shape[1])), inputs)
    picked = _checked(output(value), inputs)
    valid = inputs.valid
    if valid is not None and padded(picked, valid) is None and _explains_padding(picked, value, valid):
        raise ShapeMismatch(
            f"The explained output is {tuple(picked.shape)}, and the batch has padding among its {valid.shape[1]} "
            f"positions: which of these the output is of cannot be told, or some of them are padding. To explain the "
            f"last position that is data, give output=apd_lens.last_position(). Otherwise {GIVE_VALID}."
        )
    return picked


def _checked(picked: Any, inputs: Inputs) -> Tensor:
    """An output that is a tensor of the batch's examples."""
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
