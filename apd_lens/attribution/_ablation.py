"""Attribution by ablation: the output's change when a component is really taken out."""

from dataclasses import dataclass
from itertools import product

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from apd_lens._checks import check_fields
from apd_lens._codec import saved
from apd_lens._errors import InvalidSetting
from apd_lens._memory import BUDGET, fitting, slices
from apd_lens.attribution._over_outputs import root_mean, shared_positions
from apd_lens.components._components import ParameterComponents
from apd_lens.data._points import Granularity
from apd_lens.passes._replace import Mixture, all_but_one
from apd_lens.passes._watch import WatchedPass


@saved
@dataclass(frozen=True)
class AblationAttribution:
    """A_c(x) = sqrt( mean_o ( f_o(x, W) − f_o(x, W − P_c) )² ): the effect that other attributions estimate.

    For positions as data points the component is taken out at one position only, and the effect is that on the outputs
    at all positions. The cost is that of C forward passes, or C times the number of positions; they run as few large
    ones, in which the batch is repeated. The examples of a batch must not influence each other in the model. Outputs
    at padding do not count, and padding itself has attribution 0.

    Attributes:
        memory: bytes that a forward pass may take (estimated from the inputs and outputs of the target's matrices);
            the batch is repeated, or cut, accordingly. A CPU is faster with less, such as 2**26.
    """

    memory: int = BUDGET

    def __post_init__(self) -> None:
        check_fields(self)
        if self.memory < 1:
            raise InvalidSetting(f"memory must be at least 1 byte, got {self.memory}.")

    def __call__(
        self,
        watched: WatchedPass,
        components: ParameterComponents,
        granularity: Granularity,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch *pos C"]:
        n_examples, n_components = len(watched.output), components.n_components
        positions = shared_positions(watched.calls) if granularity == "position" else torch.Size()
        n_at_once = fitting(watched.bytes_per_example(), self.memory)
        examples_at_once = min(n_examples, n_at_once)
        replicates = n_at_once // examples_at_once
        places_at_once = min(positions.numel(), replicates)
        chosen_at_once = replicates // places_at_once
        full = watched.output.detach().to(next(components.parameters()).dtype).flatten(1)
        squares = full.new_empty(n_examples, positions.numel(), n_components)
        with torch.no_grad():
            for examples, places, chosen in product(
                slices(n_examples, examples_at_once),
                slices(positions.numel(), places_at_once),
                slices(n_components, chosen_at_once),
            ):
                here = squares[examples, places, chosen]
                some = components.picked(range(chosen.start, chosen.stop))
                on = all_but_one(some.n_components, len(here), full.device, positions, places)
                mixture = Mixture(some, on, rest=1.0, n_active=on.numel() - len(on))
                ablated = watched.replicates(mixture, examples, here[0].numel())
                ablated = rearrange(
                    ablated, "(C place example) ... o -> example place C (... o)", C=here.shape[2], place=here.shape[1]
                )
                here.copy_((full[examples, None, None] - ablated).square_().sum(-1))
        return root_mean(squares.view(n_examples, *positions, n_components), watched)
