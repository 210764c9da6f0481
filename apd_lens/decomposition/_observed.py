"""What one pass of the target over a batch shows of a decomposition."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apd_lens._block import no_inference_mode
from apd_lens.data._batch import Batch
from apd_lens.data._inputs import Inputs
from apd_lens.data._points import Real, without_padding
from apd_lens.data._stream import one_pass
from apd_lens.decomposition._decomposition import Decomposition
from apd_lens.host._target import evaluating
from apd_lens.masks._selection import K


@dataclass(frozen=True, eq=False)
class Observed:
    """A batch, and what the target and the components make of it.

    Attributes:
        inputs: what the model was called with.
        output: that is explained, zero at padding.
        real: False at padding.
    """

    inputs: Inputs
    output: Float[Tensor, "batch *output_pos n_outputs"]
    attributions: Float[Tensor, "batch *pos C"]
    mask: Bool[Tensor, "batch *pos C"]
    real: Real

    @property
    def batch(self) -> Batch:
        """As the model was called with it."""
        return self.inputs.batch

    def data(self, values: Tensor) -> Tensor:
        """`batch *pos C` as `data C`, without padding."""
        return without_padding(values, self.real).flatten(0, -2)


def observe(decomposition: Decomposition, batches: Iterable[Batch], k: K | None = None) -> Iterator[Observed]:
    """Every batch once, with its attributions and its mask; `k` as in `Decomposition.select`."""
    for batch in one_pass(batches):
        yield observed(decomposition, batch, k)


@no_inference_mode()
def observed(decomposition: Decomposition, batch: Batch | Inputs, k: K | None = None) -> Observed:
    """One batch, with its attributions and its mask."""
    selection, settings = decomposition._selection(batch, k), decomposition.settings
    with evaluating(decomposition.target.model):
        watched = decomposition._watch(batch)
        generator = torch.Generator(watched.output.device).manual_seed(0)
        granularity = settings.selection.granularity
        attributions = settings.attribution(watched, decomposition.components, granularity, generator)
    return Observed(
        inputs=watched.run.inputs,
        output=watched.output.detach(),
        attributions=attributions,
        mask=selection(attributions, watched.real),
        real=watched.real,
    )
