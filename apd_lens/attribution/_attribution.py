"""What an attribution is."""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from apd_lens.components._components import ParameterComponents
from apd_lens.data._points import Granularity
from apd_lens.passes._watch import WatchedPass


@runtime_checkable
class Attribution(Protocol):
    """Says how much each component matters on each data point of a watched pass of the target.

    An attribution of your own is a frozen dataclass with this method. Decorate it with `apd_lens.saved`, and
    decompositions that used it can be saved.
    """

    def __call__(
        self,
        watched: WatchedPass,
        components: ParameterComponents,
        granularity: Granularity,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch *pos C"]:
        """A_c(x) ≥ 0, without a graph; 0 at padding.

        Args:
            granularity: whether a data point is an "example" (`batch C`) or a "position" (`batch *pos C`).
            generator: for what is drawn, on the device of the pass.
        """
        ...
