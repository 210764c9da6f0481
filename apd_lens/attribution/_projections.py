"""How many outputs attributions look at: all of them, or random projections."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from apd_lens._errors import InvalidSetting
from apd_lens.passes._cotangents import Cotangents, one_hot_cotangents, random_cotangents

# "auto": exact up to so many outputs of an example, estimated from so many projections beyond.
EXACT_UP_TO = 128
AUTO_PROJECTIONS = 8


def check_projections(projections: int | Literal["auto", "exact"]) -> None:
    if isinstance(projections, int) and projections < 1:
        raise InvalidSetting(f"projections must be at least 1, got {projections}.")


def cotangents_for(
    output: Float[Tensor, "batch *pos n_outputs"],
    projections: int | Literal["auto", "exact"],
    kind: Literal["rademacher", "normal"],
    generator: torch.Generator | None,
) -> Cotangents:
    if are_exact(output, projections):
        return one_hot_cotangents(output)
    K = AUTO_PROJECTIONS if isinstance(projections, str) else projections
    return random_cotangents(output, K, kind, generator)


def are_exact(output: Float[Tensor, "batch *pos n_outputs"], projections: int | Literal["auto", "exact"]) -> bool:
    """Whether attributions to this output are exact, and not estimated from random projections of it."""
    return projections == "exact" or (projections == "auto" and output[0].numel() <= EXACT_UP_TO)
