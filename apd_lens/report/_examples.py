"""What is shown of an input: its tokens in words, or the features that are on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from apd_lens._errors import InvalidSetting
from apd_lens.data._batch import Batch, arguments
from apd_lens.data._inputs import Inputs
from apd_lens.host._target import TargetModel
from apd_lens.language._words import Decode, called, tokens_of
from apd_lens.responses._responses import TopExamples

# Features of an input without tokens that are shown, the largest.
_N_FEATURES = 12
# Characters of a token that are shown; a longer one is cut in the page.
_LONGEST = 200


@dataclass(eq=False)
class Words:
    """Distinct strings, each with a number, so that the page holds each once."""

    strings: list[str] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)

    def number(self, string: str) -> int:
        string = string if len(string) <= _LONGEST else f"{string[:_LONGEST]}…"
        if string not in self.numbers:
            self.numbers[string] = len(self.strings)
            self.strings.append(string)
        return self.numbers[string]


@dataclass(frozen=True)
class Shown:
    """What is shown of one example for one component.

    Attributes:
        number: of the example.
        words: its tokens, or features.
        shades: of each from 0 to 9, by attribution, or of features by size; empty if nothing is known of them.
        active: whether the component was active at each; empty where data points are examples.
        first: position of the first word, in the example; 0 for features.
        cut: whether more comes behind the last.
    """

    number: int
    words: tuple[int, ...]
    shades: tuple[int, ...]
    active: tuple[bool, ...]
    first: int
    cut: bool


class Shower:
    """Shows examples of one target; words are put into `words`."""

    def __init__(
        self,
        target: TargetModel,
        decode: Decode | None,
        input_names: Sequence[str] | None,
        before: int,
        after: int,
        words: Words,
    ):
        self.target, self.decode, self.input_names = target, decode, input_names
        self.before, self.after, self.words = before, after, words
        self._tokens: dict[int, list[int] | None] = {}
        self._decoded: dict[int, int] = {}

    def word(self, token: int) -> int:
        """The number of a token's word."""
        if token not in self._decoded:
            self._decoded[token] = self.words.number(called(self.decode, token, "decode"))
        return self._decoded[token]

    def tokens(self, inputs: Inputs, number: int) -> list[int] | None:
        """Of an example, padding too; None for a model of other inputs."""
        if number not in self._tokens:
            self._tokens[number] = tokens_of(inputs.batch, self.target.model)
        return self._tokens[number]

    @property
    def has_tokens(self) -> bool:
        return any(tokens is not None for tokens in self._tokens.values())

    def at_tokens(self, inputs: Inputs, number: int, rows: Sequence[Any]) -> list[Any]:
        """Those of the rows, one for each position, that are not of padding; none if they are of something else."""
        tokens, valid = self.tokens(inputs, number), inputs.valid
        if tokens is None or len(rows) != len(tokens):
            return []
        return list(compress(rows, valid[0].tolist())) if valid is not None and valid.shape[1] == len(rows) else [*rows]

    def shown(self, top: TopExamples, component: int, largest: float = 0.0) -> list[Shown]:
        """The examples of one component; shades are relative to the largest attribution of them all, or a larger one
        that is given."""
        numbers = top.example[component].tolist()
        values: list[list[float]] = [[]] * len(numbers)
        active: list[list[bool]] = [[]] * len(numbers)
        if top.positions is not None:
            largest = max(largest, top.positions[component].nan_to_num(0).max().item())
            rows = top.positions[component].tolist()
            values = [[value for value in row if not math.isnan(value)] for row in rows]
        if top.active_positions is not None:
            active = top.active_positions[component].tolist()
        return [self._shown(top.read[n], n, values[i], active[i], largest) for i, n in enumerate(numbers)]

    def _shown(
        self, inputs: Inputs, number: int, values: Sequence[float], active: Sequence[bool], largest: float
    ) -> Shown:
        tokens = self.tokens(inputs, number)
        if tokens is None:
            return self._features(number, inputs.batch)
        values, active = (self.at_tokens(inputs, number, some) for some in (values, active[: len(tokens)]))
        tokens = self.at_tokens(inputs, number, tokens)
        centre = max(range(len(values)), key=values.__getitem__, default=0)
        first = max(0, min(centre - self.before, len(tokens) - self.before - self.after - 1))
        window = slice(first, first + self.before + self.after + 1)
        return Shown(
            number=number,
            words=tuple(self.word(token) for token in tokens[window]),
            shades=_shades(values[window], largest),
            active=tuple(active[: len(values)][window]),
            first=first,
            cut=window.stop < len(tokens),
        )

    def _features(self, number: int, batch: Batch) -> Shown:
        """The largest entries of the first tensor, in their order, each as "name value"."""
        args, kwargs = arguments(batch)
        tensor = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if tensor is None:
            return Shown(number, (self.words.number(str(args[0] if args else kwargs)),), (), (), 0, False)
        flat = tensor[0].flatten().float().cpu()
        on = flat.abs().topk(min(_N_FEATURES, len(flat))).indices.sort().values
        on = on[flat[on] != 0]
        words = tuple(self.words.number(f"{self._input_name(i, tensor)} {flat[i]:.3g}") for i in on.tolist())
        return Shown(number, words, _shades(flat[on].abs().tolist(), flat.abs().max().item()), (), 0, False)

    def _input_name(self, index: int, tensor: Tensor) -> str:
        if self.input_names is not None:
            if len(self.input_names) != tensor[0].numel():
                raise InvalidSetting(
                    f"Expected {tensor[0].numel()} input_names, one for each number of an input, got "
                    f"{len(self.input_names)}."
                )
            return self.input_names[index]
        place = torch.unravel_index(torch.tensor(index, device="cpu"), tensor.shape[1:])
        return f"x[{','.join(str(int(i)) for i in place)}]"


def _shades(values: Sequence[float], largest: float) -> tuple[int, ...]:
    return tuple(round(9 * min(1.0, value / largest)) if largest > 0 else 0 for value in values)
