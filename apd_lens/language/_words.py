"""Tokens as words: what a tokenizer says of a token, and which tokens a batch has."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from apd_lens._errors import InvalidSetting
from apd_lens.data._batch import Batch, arguments

# Token id -> what is shown for it.
Decode = Callable[[int], str]


def own_decode(model: nn.Module) -> Decode | None:
    """What the model's own tokenizer says; None without one."""
    tokenizer = getattr(model, "tokenizer", None)
    return None if tokenizer is None else decode_with(tokenizer)


def decode_with(decode: Any) -> Decode:
    """A function of a token, of a tokenizer or of such a function."""
    return (lambda token: decode.decode([token])) if hasattr(decode, "decode") else decode


def tokens_of(batch: Batch, model: nn.Module) -> list[int] | None:
    """The tokens of a batch of one example; None for a model of other inputs."""
    args, kwargs = arguments(batch)
    to_tokens: Any = getattr(model, "to_tokens", None)
    if args and isinstance(args[0], list | tuple | str) and to_tokens is not None:
        return to_tokens(args[0]).flatten().tolist()  # texts for a TransformerLens model
    for value in (*args, *(value for name, value in kwargs.items() if name != "attention_mask")):
        if isinstance(value, Tensor) and value.ndim == 2 and holds_tokens(value):
            return value[0].tolist()
    return None


def holds_tokens(value: Tensor) -> bool:
    """Whether a tensor is of whole numbers."""
    return not value.is_floating_point() and str(value.dtype) != "torch.bool"


def called(decode: Decode | None, token: int, name: str) -> str:
    """What the user's function gives for a number; the number itself without a function.

    Raises:
        InvalidSetting: no string.
    """
    if decode is None:
        return str(token)
    word: Any = decode(token)
    if not isinstance(word, str):
        raise InvalidSetting(f"Expected {name} to give a string, got {word!r} for {token}.")
    return word
