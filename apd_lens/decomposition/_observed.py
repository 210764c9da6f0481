"""What one pass of the target over a batch shows of a decomposition."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apd_lens._block import no_inference_mode
from apd_lens._codec import UserFunction
from apd_lens._errors import ArtifactError
from apd_lens._settings import Settings
from apd_lens.attribution._gradient import GradientAttribution
from apd_lens.components._components import ParameterComponents
from apd_lens.data._batch import Batch
from apd_lens.data._finite import raise_first, reading_of_attributions
from apd_lens.data._inputs import Inputs
from apd_lens.data._points import Valid, without_padding
from apd_lens.masks._error import AttributionError, attribution_error
from apd_lens.masks._selection import BatchTopK, K, Selection, with_k
from apd_lens.passes._watch import WatchedPass


@dataclass(frozen=True, eq=False)
class Observed:
    """What the target and the components make of a batch, from one pass. `Decomposition.observe` makes it.

    Attributes:
        inputs: the batch as the model was called with it.
        output: the explained output of the target, zero at padding.
        attributions: A_c(x), as of `Decomposition.attributions`.
        selection: finds the active components.
        valid: False at padding; None where every position is data.
        error: of estimated attributions, where it was asked for.
    """

    inputs: Inputs
    output: Float[Tensor, "batch *output_pos n_outputs"]
    attributions: Float[Tensor, "batch *pos C"]
    selection: Selection
    valid: Valid
    error: AttributionError | None = None

    @cached_property
    def mask(self) -> Bool[Tensor, "batch *pos C"]:
        """The active components. Raises as `Decomposition.select` does."""
        return self.select()

    def select(self, k: K | None = None) -> Bool[Tensor, "batch *pos C"]:
        """The mask with another k, as of `Decomposition.select`."""
        return selection_of(self.selection, self.inputs.batch, k)(self.attributions, self.valid)

    def data(self, values: Tensor) -> Tensor:
        """`batch *pos C` as `data C`, without padding."""
        return without_padding(values, self.valid).flatten(0, -2)


@no_inference_mode()
def observed(
    watched: WatchedPass,
    components: ParameterComponents,
    settings: Settings,
    k: K | None = None,
    with_error: bool = False,
) -> Observed:
    """What a pass of the target shows; it uses up the pass's graph. To be called with the model in eval mode.

    Args:
        with_error: says how far estimated attributions are off, too.
    """
    generator = torch.Generator(watched.output.device).manual_seed(0)
    attribution, granularity = settings.attribution, settings.selection.granularity
    error = None
    if (
        with_error
        and isinstance(attribution, GradientAttribution)
        and attribution.projections != 1
        and not attribution.is_exact(watched, components, granularity)
    ):
        samples = attribution.samples(watched, components, granularity, generator)
        attributions = samples.square().mean(0).sqrt()
        error = attribution_error(samples, selection_of(settings.selection, watched.run.batch, k), watched.valid)
    else:
        attributions = attribution(watched, components, granularity, generator)
    raise_first([reading_of_attributions(attributions, "attributions")])
    return Observed(
        inputs=watched.run.inputs,
        output=watched.output.detach(),
        attributions=attributions,
        selection=with_k(settings.selection, k),
        valid=watched.valid,
        error=error,
    )


def selection_of(selection: Selection, batch: Batch, k: K | None = None) -> Selection:
    """The selection of one batch, after the training.

    Raises:
        ArtifactError: k was a function, which was not saved.
    """
    selection = with_k(selection, k)
    if isinstance(selection, BatchTopK) and isinstance(selection.k, UserFunction):
        raise ArtifactError(
            f"k was the function {selection.k.name} of the batch, which was not saved. Give it again, or a number: "
            "decomposition.select(batch, k=...)."
        )
    return selection.at(1.0, batch)
