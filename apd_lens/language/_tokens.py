"""What components respond to and do, in words."""

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from apd_lens._errors import InvalidSetting
from apd_lens._table import WIDTH, Printed, frame
from apd_lens.data._batch import Batch, are_texts
from apd_lens.data._inputs import Inputs
from apd_lens.decomposition._decomposition import Decomposition
from apd_lens.language._words import Decode, called, decode_with, own_decode, tokens_of
from apd_lens.masks._selection import K
from apd_lens.responses._responses import Responses
from apd_lens.responses._top import responses

if TYPE_CHECKING:
    from pandas import DataFrame

# A space at which a line is not broken, so that a token stays in one piece.
_NO_BREAK = "\N{NO-BREAK SPACE}"
# Tokens that are shown in front of the one at which a component is most active, and behind it.
_BEFORE, _AFTER = 12, 6


@dataclass(frozen=True)
class Place:
    """A place in the data at which a component is active.

    Attributes:
        example: number of the example, counted through all batches.
        position: of the largest attribution in it; −1 where that is not known.
        attribution: of the component, on this example.
        active: whether the component was active on the example.
        token: the token at the position, in words; "" where the position is not known.
        text: the tokens around it, the token itself in ‹›.
    """

    example: int
    position: int
    attribution: float
    active: bool
    token: str
    text: str


@dataclass(frozen=True, eq=False, repr=False)
class ComponentTokens(Printed):
    """What each component responds to and does, in words. `component_tokens` makes it; `print` shows the most active.

    Attributes:
        places: for each component the places of its largest attributions, the largest first.
        raises: for each component the tokens that it makes more likely, with the change of their probability.
        lowers: those that it makes less likely.
        responses: the numbers behind it.
    """

    places: list[list[Place]]
    raises: list[list[tuple[str, float]]]
    lowers: list[list[tuple[str, float]]]
    responses: Responses

    def table(self) -> "DataFrame":
        """One row for each component and place, with the token that the component raises and lowers most."""
        rows = [(component, place) for component, places in enumerate(self.places) for place in places]
        return frame(
            {
                "component": [component for component, _ in rows],
                "active": [self.responses.active[component].item() for component, _ in rows],
                "example": [place.example for _, place in rows],
                "position": [place.position for _, place in rows],
                "attribution": [place.attribution for _, place in rows],
                "token": [place.token for _, place in rows],
                "text": [place.text for _, place in rows],
                "raises": [_first(self.raises[component]) for component, _ in rows],
                "lowers": [_first(self.lowers[component]) for component, _ in rows],
            }
        )

    def text(self, components: Iterable[int] | None = None) -> str:
        """What these components respond to and do, in lines of 120 characters at most."""
        order = self._order() if components is None else list(components)
        return "\n".join(line for component in order for line in self._lines(component))

    def _parts(self) -> list[str]:
        order = self._order()
        shown = self.text(order[:8])
        others = f"and {len(order) - 8} others: .text() shows them, .table() has all"
        return [shown, others] if len(order) > 8 else [shown]

    def _order(self) -> list[int]:
        """The most active first."""
        active, attribution = self.responses.active.tolist(), self.responses.attribution.tolist()
        return sorted(range(len(active)), key=lambda c: (-active[c], -attribution[c]))

    def _lines(self, component: int) -> list[str]:
        head = (
            f"component {component}, active {self.responses.active[component]:.1%}, "
            f"raises {_listed(self.raises[component])}; lowers {_listed(self.lowers[component])}"
        )
        places = [
            f"    {place.attribution:.3g}{'' if place.active else ' (not active)'}  {_cut(place.text, WIDTH - 30)}"
            for place in self.places[component]
        ]
        wrapped = textwrap.wrap(head, WIDTH, subsequent_indent="    ")
        return [*(line.replace(_NO_BREAK, " ") for line in wrapped), *places]


def component_tokens(
    decomposition: Decomposition,
    batches: Batch | Iterable[Batch],
    decode: Any = None,
    *,
    places: int = 3,
    outputs: int = 3,
    k: K | None = None,
) -> ComponentTokens:
    """What each component responds to and does, in words.

    For each component it shows the examples on which its attribution is largest, with the token at which it is, and the
    tokens whose probability the component raises and lowers most there, measured by taking it out.

    Args:
        batches: a batch of tokens, or several.
        decode: a tokenizer, or a function token -> string; default the model's own.
        places: how many examples are shown of each component.
        outputs: how many tokens are named that it raises, and how many that it lowers.
        k: how many components are active, as in `Decomposition.select`.

    Raises:
        InvalidSetting: no tokenizer; fewer than one place or output; or a `decode` that gives no string.
    """
    target = decomposition.target
    word = own_decode(target.model) if decode is None else decode_with(decode)
    if word is None:
        raise InvalidSetting(
            f"This {type(target.model).__name__} has no tokenizer of its own. Give decode=, a tokenizer or a function "
            "token -> string."
        )
    one = isinstance(batches, Tensor | dict | str) or hasattr(batches, "keys") or are_texts(batches)
    found = responses(decomposition, [batches] if one else batches, examples=places, outputs=outputs, k=k, centred=True)
    top, effects = found.top, found.effects
    assert effects.promoted_p is not None
    assert effects.suppressed_p is not None

    def tokens(which: Tensor, by: Tensor, sign: int) -> list[tuple[str, float]]:
        pairs = zip(which.tolist(), by.tolist(), strict=True)
        return [(called(word, token, "decode"), change) for token, change in pairs if sign * change > 0]

    places_of = []
    for c in range(len(found.active)):
        of_one = []
        for rank, number in enumerate(top.of(c)):
            position = -1 if top.positions is None else int(top.positions[c, rank].nan_to_num(-1).argmax())
            attribution, active = top.attribution[c, rank].item(), bool(top.active[c, rank])
            token, text = _around(top.read[number], target.model, word, position)
            of_one.append(Place(number, position, attribution, active, token, text))
        places_of.append(of_one)
    return ComponentTokens(
        places=places_of,
        raises=[tokens(*pair, 1) for pair in zip(effects.promoted, effects.promoted_p, strict=True)],
        lowers=[tokens(*pair, -1) for pair in zip(effects.suppressed, effects.suppressed_p, strict=True)],
        responses=found,
    )


def _around(inputs: Inputs, model: Any, word: Decode, position: int) -> tuple[str, str]:
    """The token at a position, and the text around it."""
    tokens = tokens_of(inputs.batch, model)
    if tokens is None:
        return "", "(no tokens)"
    kept = list(range(len(tokens)))
    if inputs.valid is not None and inputs.valid.shape[1] == len(tokens):
        kept = inputs.valid[0].nonzero()[:, 0].tolist()
    words = {place: _visible(called(word, tokens[place], "decode")) for place in kept}
    if position not in words:
        return "", "".join(words.values())
    near = [place for place in kept if position - _BEFORE <= place <= position + _AFTER]
    text = "".join(f"‹{words[place]}›" if place == position else words[place] for place in near)
    before, after = "…" if near[0] != kept[0] else "", "…" if near[-1] != kept[-1] else ""
    return words[position], f"{before}{text}{after}"


def _visible(text: str) -> str:
    return text.replace("\n", "↵").replace("\t", "⇥")


def _listed(tokens: list[tuple[str, float]]) -> str:
    words = [f"{_visible(token)!r} {change:+.2g}".replace(" ", _NO_BREAK) for token, change in tokens]
    return ", ".join(words) or "nothing"


def _first(tokens: list[tuple[str, float]]) -> str:
    return tokens[0][0] if tokens else ""


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
