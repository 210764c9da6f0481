"""Which prompts a model answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apd_lens._block import no_grad
from apd_lens._errors import InvalidSetting, ShapeMismatch
from apd_lens._table import Printed, frame
from apd_lens.data._batch import Batch
from apd_lens.host._patch import outside_traces
from apd_lens.host._target import evaluating
from apd_lens.host._wrap import wrap
from apd_lens.language._template import ids_of
from apd_lens.passes._output import explained_call
from apd_lens.passes._positions import last_position

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, eq=False, repr=False)
class Known(Printed):
    """What a model says behind each prompt of a batch. `known` makes it.

    Attributes:
        token: the most likely next token.
        probability: its probability.
        is_known: whether the model answers the prompt: with that probability or more, and rightly where the answers
            were given.
        floor: the least probability that counts as an answer.
    """

    token: Int[Tensor, " prompts"]
    probability: Float[Tensor, " prompts"]
    is_known: Bool[Tensor, " prompts"]
    floor: float

    @property
    def which(self) -> list[int]:
        """Numbers of the prompts that the model answers."""
        return self.is_known.nonzero()[:, 0].tolist()

    def table(self) -> "DataFrame":
        """One row for each prompt."""
        return frame({"token": self.token, "probability": self.probability, "known": self.is_known})

    def _parts(self) -> list[str]:
        n, of = int(self.is_known.sum()), len(self.is_known)
        mean = f", mean probability {self.probability[self.is_known].mean():.2f}" if n else ""
        return [f"{n} of {of} prompts known (most likely token, probability of {self.floor:g} or more{mean})"]


@no_grad()
def known(
    model: Any,
    batch: Batch,
    answers: Int[Tensor, " prompts"] | Sequence[int] | Sequence[str] | None = None,
    *,
    floor: float = 0.15,
    tokenizer: Any = None,
) -> Known:
    """Which prompts the model answers, so that one can take apart what it knows.

    Args:
        batch: prompts; the answer comes behind the last position of each that is data.
        answers: the right tokens; or words, of which the first token counts, behind a space. None: any token counts.
        floor: the least probability that counts as an answer.
        tokenizer: for answers that are words; default the model's own.

    Raises:
        ShapeMismatch: not one answer a prompt.
        InvalidSetting: words without a tokenizer.
    """
    target = wrap(model)
    device = next(target.model.parameters()).device
    with evaluating(target.model), outside_traces(target.model):
        logits = explained_call(target, (), last_position(), target.read(batch, device))
    probability, token = logits.float().softmax(-1).max(-1)
    is_known = probability >= floor
    if answers is not None:
        right = _as_tokens(answers, tokenizer or getattr(model, "tokenizer", None)).to(device)
        if right.shape != token.shape:
            raise ShapeMismatch(f"Expected one answer for each of the {len(token)} prompts, got {tuple(right.shape)}.")
        is_known = is_known & (token == right)
    return Known(token.cpu(), probability.cpu(), is_known.cpu(), floor)


def _as_tokens(answers: Any, tokenizer: Any) -> Tensor:
    if isinstance(answers, Tensor) or not all(isinstance(answer, str) for answer in answers):
        return torch.as_tensor(answers)
    if tokenizer is None:
        raise InvalidSetting("Answers that are words need tokenizer=, or give the tokens.")
    return torch.tensor([ids_of(tokenizer, f" {answer.strip()}", special=False)[0] for answer in answers])
