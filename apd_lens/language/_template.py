"""Prompts made from a text with slots, with the positions of what was put into the slots."""

import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from apd_lens._errors import InvalidSetting


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts as tokens, and where the words of the slots are in them.

    Attributes:
        texts: the prompts.
        input_ids: their tokens, with padding.
        attention_mask: 0 at padding.
        slots: name of a slot -> True at the tokens of what was put there.
        padding_side: "right" or "left".
    """

    texts: list[str]
    input_ids: Int[Tensor, "prompts pos"]
    attention_mask: Int[Tensor, "prompts pos"]
    slots: dict[str, Bool[Tensor, "prompts pos"]]
    padding_side: str = "right"

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def batch(self) -> dict[str, Tensor]:
        """What a Hugging Face model is called with."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    @property
    def lengths(self) -> Int[Tensor, " prompts"]:
        """Numbers of tokens."""
        return self.attention_mask.sum(1)

    @property
    def last(self) -> Int[Tensor, " prompts"]:
        """The position of each prompt's last token."""
        return _last_true(self.attention_mask.bool())

    def last_of(self, slot: str) -> Int[Tensor, " prompts"]:
        """The position of a slot's last token in each prompt."""
        if slot not in self.slots:
            raise InvalidSetting(f"There is no slot {slot!r} in these prompts. They have {sorted(self.slots)}.")
        return _last_true(self.slots[slot])

    def some(self, which: Iterable[int] | Tensor) -> "Prompts":
        """Some of the prompts, by their numbers or by a bool for each. Positions that are padding in all go."""
        chosen = torch.as_tensor(which if isinstance(which, Tensor) else list(which))
        numbers = chosen.nonzero()[:, 0] if chosen.dtype == torch.bool else chosen.long()
        used = self.attention_mask[numbers].bool().any(0)
        return Prompts(
            texts=[self.texts[number] for number in numbers.tolist()],
            input_ids=self.input_ids[numbers][:, used],
            attention_mask=self.attention_mask[numbers][:, used],
            slots={name: mask[numbers][:, used] for name, mask in self.slots.items()},
            padding_side=self.padding_side,
        )

    def batches(self, size: int = 20) -> list[dict[str, Tensor]]:
        """What a Hugging Face model is called with, so many prompts at a time."""
        starts = range(0, len(self), size)
        return [self.some(range(start, min(start + size, len(self)))).batch for start in starts]

    def by_length(self) -> list["Prompts"]:
        """The prompts in groups of one number of tokens, the shortest first; none has padding."""
        return [self.some(self.lengths == length) for length in self.lengths.unique().tolist()]


@dataclass(frozen=True)
class Template:
    """A text with slots in braces, such as "The capital of {country} is".

    Attributes:
        text: the text. A slot may stand in it once.
        special_tokens: whether the tokenizer adds the tokens that it puts at the beginning of every text.

    Raises:
        InvalidSetting: a slot without a name, or twice.
    """

    text: str
    special_tokens: bool = True

    def __post_init__(self) -> None:
        names = [name for _, name, _, _ in self._parts() if name is not None]
        if len(set(names)) != len(names) or not all(name.isidentifier() for name in names):
            raise InvalidSetting(
                f"Each slot needs a name of its own, such as {{country}}, and stands there once, got {self.text!r}."
            )

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the slots, in their order."""
        return tuple(name for _, name, _, _ in self._parts() if name is not None)

    def prompts(self, tokenizer: Any, **values: Sequence[str]) -> Prompts:
        """One prompt for each value of the slots.

        Args:
            tokenizer: one of Hugging Face's, or a function text -> tokens.
            values: for each slot the words to put there, as many for all slots.

        Raises:
            InvalidSetting: a slot without words, words without a slot, or not as many for all.
        """
        counts = {len(words) for words in values.values()}
        if set(values) != set(self.slots) or len(counts) != 1 or any(isinstance(v, str) for v in values.values()):
            raise InvalidSetting(
                f"Expected a list of words for each of the slots {list(self.slots)}, all of one length, got "
                f"{ {name: len(words) for name, words in values.items()} }."
            )
        if counts == {0}:
            raise InvalidSetting("Expected one word or more for each slot, got none.")
        rows = [dict(zip(values, words, strict=True)) for words in zip(*values.values(), strict=True)]
        filled = [self._filled(row) for row in rows]
        tokens = [_tokens(tokenizer, text, spans, self.special_tokens) for text, spans in filled]
        width = max(len(ids) for ids, _ in tokens)
        side = getattr(tokenizer, "padding_side", "right")

        def padded(row: Sequence[Any], filler: Any) -> list[Any]:
            padding = [filler] * (width - len(row))
            return padding + list(row) if side == "left" else list(row) + padding

        return Prompts(
            texts=[text for text, _ in filled],
            input_ids=torch.tensor([padded(ids, _filler(tokenizer)) for ids, _ in tokens]),
            attention_mask=torch.tensor([padded([1] * len(ids), 0) for ids, _ in tokens]),
            slots={name: torch.tensor([padded(inside[name], False) for _, inside in tokens]) for name in self.slots},
            padding_side=side,
        )

    def _parts(self) -> list[tuple[str, str | None, str | None, str | None]]:
        try:
            return list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise InvalidSetting(f"The braces of {self.text!r} do not fit: {error}.") from None

    def _filled(self, row: dict[str, str]) -> tuple[str, dict[str, tuple[int, int]]]:
        """The text, and where in it the words of each slot start and end."""
        text, spans = "", {}
        for before, name, _, _ in self._parts():
            text += before
            if name is not None:
                spans[name] = (len(text), len(text) + len(row[name]))
                text += row[name]
        return text, spans


def _tokens(
    tokenizer: Any, text: str, spans: dict[str, tuple[int, int]], special: bool
) -> tuple[list[int], dict[str, list[bool]]]:
    """The tokens of a text, and which of them are of each slot."""
    if getattr(tokenizer, "is_fast", False):
        made = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        ids, places = list(made["input_ids"]), made["offset_mapping"]
        inside = {
            name: [first < end and last > start and last > first for first, last in places]
            for name, (start, end) in spans.items()
        }
    else:
        ids, plain, inside = ids_of(tokenizer, text, special), ids_of(tokenizer, text, special=False), {}
        before = next((i for i in range(len(ids)) if ids[i : i + len(plain)] == plain), 0)
        for name, (start, end) in spans.items():
            first, _ = _common(ids_of(tokenizer, text[:start], special=False), plain)
            common, is_prefix = _common(ids_of(tokenizer, text[:end], special=False), plain)
            last = common - 1 if is_prefix else common
            inside[name] = [first <= place - before <= max(first, last) for place in range(len(ids))]
    for name, mask in inside.items():
        if not any(mask):
            raise InvalidSetting(f"The slot {name!r} has no token of its own in {text!r}. Give it a word.")
    return ids, inside


def ids_of(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    """The tokens that a tokenizer, or a function, makes of a text."""
    if hasattr(tokenizer, "decode"):
        return list(tokenizer(text, add_special_tokens=special)["input_ids"])
    return [int(token) for token in torch.as_tensor(tokenizer(text)).flatten()]


def _common(part: list[int], whole: list[int]) -> tuple[int, bool]:
    """How many tokens are the same from the start, and whether these are all of the part."""
    n = 0
    while n < min(len(part), len(whole)) and part[n] == whole[n]:
        n += 1
    return n, n == len(part)


def _filler(tokenizer: Any) -> int:
    found = [getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id")]
    return next((token for token in found if token is not None), 0)


def _last_true(mask: Bool[Tensor, "prompts pos"]) -> Int[Tensor, " prompts"]:
    return mask.shape[1] - 1 - mask.flip(1).byte().argmax(1)
