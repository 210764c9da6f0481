"""Attribution by activation: how large a component's output is, times the gradient there."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from apd_lens._codec import saved
from apd_lens.components._components import ParameterComponents
from apd_lens.components._products import component_outputs
from apd_lens.data._points import Granularity, zero_at_padding
from apd_lens.passes._watch import WatchedPass


@saved
@dataclass(frozen=True)
class ActivationAttribution:
    """Σ_l Σ_uses ‖x_l P_c,l‖², with x from the forward pass of the summed components. Needs no gradients.

    It has squared units of the activations. It measures how much a component writes, not whether anything reads it.
    """

    def __call__(
        self,
        watched: WatchedPass,
        components: ParameterComponents,
        granularity: Granularity,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch *pos C"]:
        total = None
        watched.check_padding_of_positions()  # x at padding counts
        with torch.no_grad():
            for call in watched.again(components, slice(None)).calls:
                norms = component_outputs(call.x, *components.factors(call.use)).square().sum(-1)
                norms = zero_at_padding(norms, watched.valid)
                if granularity == "example" and norms.ndim > 2:
                    norms = norms.sum(tuple(range(1, norms.ndim - 1)))
                norms = norms.to(watched.output.device)
                total = norms if total is None else total + norms
        assert total is not None
        return total
