"""Streams: data, who says what is active on it, and what counts there."""

from dataclasses import dataclass, replace

from torch import Tensor

from apd_lens.losses._losses import Losses
from apd_lens.masks._masking import Masking


@dataclass(frozen=True)
class Stream:
    """What is asked of the components on one kind of data.

    Attributes:
        masking: says which components are active.
        losses: what counts, and how much.
        name: stands in front of the names of its loss terms; "" for the only one.
    """

    masking: Masking
    losses: Losses
    name: str = ""

    def named(self, term: str) -> str:
        """The name of a loss term of this stream."""
        return f"{self.name} {term}".lstrip()

    def after(self, minimality: Tensor, progress: float, steps: int) -> "Stream":
        """The stream of the next step, see `Masking.after`."""
        return self.with_masking(self.masking.after(minimality, progress, steps))

    def with_masking(self, masking: Masking) -> "Stream":
        """The same stream with a later form of its masking."""
        return replace(self, masking=masking)
