"""What moves are, and what they look at."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apd_lens._errors import InvalidSetting
from apd_lens.components._components import ParameterComponents
from apd_lens.passes._watch import WatchedPass


@dataclass(frozen=True, eq=False)
class MoveContext:
    """What moves look at; they change the components, and the optimizer's moments, in place.

    Attributes:
        weights: name -> the decomposed matrix, in the dtype of the factors.
        watched: the target's pass over the batch of the step. Of several processes only x is there, of the whole batch;
            `watched.again(None, slice(None))` runs it for outputs.
        attributions, active: of that batch; `active` only for moves that need it.
        generator: on the CPU.
        sums_to_weights: whether components are to sum to the weights; else what they lack belongs to the rest.
    """

    components: ParameterComponents
    optimizer: torch.optim.Optimizer
    weights: Mapping[str, Float[Tensor, "..."]]
    watched: WatchedPass
    attributions: Float[Tensor, "batch *pos C"]
    active: Bool[Tensor, "batch *pos C"] | None
    generator: torch.Generator
    sums_to_weights: bool = True


@runtime_checkable
class Moves(Protocol):
    """Discrete changes of components between steps.

    Moves of your own are a frozen dataclass with these members. Decorate it with `apd_lens.saved`, and
    decompositions that used it can be saved.

    Attributes:
        every: steps between moves.
        until: share of the steps after which no more moves are made.
        needs_active: whether `MoveContext.active` is looked at.
        has_start: whether `start` does anything.
    """

    needs_active: ClassVar[bool]
    has_start: ClassVar[bool]

    @property
    def every(self) -> int: ...

    @property
    def until(self) -> float: ...

    def start(self, components: ParameterComponents, weights: Mapping[str, Float[Tensor, "..."]]) -> None:
        """Changes fresh components in place, before the first step."""
        ...

    def __call__(self, context: MoveContext) -> int:
        """Makes moves, in place and for all matrices at once; returns how many."""
        ...


def are_due(moves: Moves | None, step: int, n_steps: int) -> bool:
    """Whether moves are made after a step, counted from 0."""
    return moves is not None and (step + 1) % moves.every == 0 and step + 1 < moves.until * n_steps


def check_every(moves: Moves) -> None:
    """Raises InvalidSetting unless there is a step between moves."""
    if moves.every < 1:
        raise InvalidSetting(f"{type(moves).__name__} needs every >= 1 step, got {moves.every}.")
