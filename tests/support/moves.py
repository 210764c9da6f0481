"""What moves look at, made by hand."""

from torch import Tensor

import apd_lens as apd
from apd_lens.moves._moves import MoveContext
from apd_lens.passes._watch import WatchedPass


def context_of(
    state: apd.training.State, watched: WatchedPass, attributions: Tensor, active: Tensor | None = None
) -> MoveContext:
    """Of a training that has come so far."""
    return MoveContext(
        components=state.components,
        optimizer=state.optimizer,
        weights=state.weights,
        watched=watched,
        attributions=attributions,
        active=active,
        generator=state.draws("moves"),
    )
