"""Split moves: taking a part out of a component that serves different data points, and giving it to a dead one.

Gradient descent alone does not leave the state in which a few components serve everything: those that were picked
first are picked again. A move looks at nothing but the inputs and the attributions. Optimizer moments of both parts
start from zero, which lets them learn faster than the others for a while; without that they mostly merge again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from apd_lens._block import no_grad
from apd_lens._checks import check_fields
from apd_lens._codec import saved
from apd_lens.components._components import ParameterComponents
from apd_lens.components._factors import MatrixInput
from apd_lens.data._points import without_padding
from apd_lens.moves._moves import MoveContext, check_every
from apd_lens.moves._surgery import Split, inputs_of_data_points, settle, split_component


@saved
@dataclass(frozen=True)
class SplitMoves:
    """Settings of split moves: a component that serves different inputs gives a part of itself to a dead one.

    Attributes:
        every: steps between moves.
        until: share of the steps after which no more moves are made.
        noise: standard deviation of the noise that is added to the factors of both parts, so that spare rank can grow.
    """

    every: int = 100
    until: float = 0.6
    noise: float = 5e-3

    needs_active: ClassVar[bool] = False
    has_start: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self)
        check_every(self)

    def start(self, components: ParameterComponents, weights: Mapping[str, Float[Tensor, "..."]]) -> None:
        """Changes nothing."""

    @no_grad()
    def __call__(self, context: MoveContext) -> int:
        """Splits what can be split; returns how many splits were made. Of several uses of a matrix the first counts."""
        components, attributions, valid = context.components, context.attributions, context.watched.valid
        inputs = inputs_of_data_points(components, attributions, valid, context.watched.calls)
        alike = torch.zeros(len(inputs[0][1]), dtype=torch.float32, device=attributions.device)
        for use, x in inputs:
            projected = _random_projection(x, components.factors(use)[0].shape[1], context.generator)
            alike += projected.to(alike.device)
        plan = plan_splits(without_padding(attributions, valid).flatten(0, -2), alike)
        made = [split for split in plan if split_component(components, split, inputs)]
        touched = sorted({c for split in made for c in (split.old, split.new)})
        settle(components, context.optimizer, touched, self.noise, context.generator)
        return len(made)


def plan_splits(attributions: Float[Tensor, "data C"], alike: Float[Tensor, " data"]) -> list[Split]:
    """Which components to split: each that is the top one of several data points, most first.

    About half of them go to the dead component (top of none) with the smallest attribution. Which half is random, but
    data points that look alike stay together.

    Args:
        alike: a random number for each data point that is nearly the same for points that look alike, but for its sign.
    """
    n_components = attributions.shape[1]
    top = attributions.argmax(1)
    held = torch.bincount(top, minlength=n_components).tolist()
    peak = attributions.max(0).values.tolist()
    dead = sorted((c for c in range(n_components) if held[c] == 0), key=lambda c: peak[c])
    crowded = sorted((c for c in range(n_components) if held[c] > 1), key=lambda c: -held[c])
    splits = []
    for old, new in zip(crowded, dead, strict=False):
        size = alike.abs()
        given = (top == old) & (size > size[top == old].mean())
        splits.append(Split(old, new, given, (top == old) & ~given))
    return splits


def _random_projection(x: MatrixInput, d_in: int, generator: torch.Generator) -> Float[Tensor, " data"]:
    """Normalised inputs of each data point, summed over positions, times a random direction."""
    direction = torch.randn(d_in, generator=generator, dtype=torch.float32, device="cpu").to(x.device)
    if x.is_floating_point():
        direction = direction.to(x.dtype)
        along = (x @ direction) / x.norm(dim=-1).clamp_min(torch.finfo(x.dtype).tiny)
    else:
        along = direction[x]
    return along.reshape(len(x), -1).sum(1).float()
