"""How far estimated attributions choose other components than exact ones."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from apd_lens.data._points import Valid
from apd_lens.masks._selection import Selection


@dataclass(frozen=True)
class AttributionError:
    """How far attributions are off that are estimated from K projections.

    Attributes:
        relative: standard error of an attribution over the attribution, the median over active components.
        agreement: share of the active (data point, component) pairs that half of the projections select and the other
            half selects too. Chance is k / C.
    """

    relative: float
    agreement: float


def attribution_error(
    samples: Float[Tensor, "K batch *pos C"], selection: Selection, valid: Valid = None
) -> AttributionError:
    """The spread of the estimates that each of K projections gives alone, and whether two halves select the same.

    The standard error of A² is std(samples²) / √K; of A = √(A²) it is that over 2 A.
    """
    squares, K = samples.square(), len(samples)
    mean = squares.mean(0)
    relative = squares.std(0) / K**0.5 / (2 * mean.clamp_min(torch.finfo(mean.dtype).tiny))
    active = selection(mean.sqrt(), valid)
    first, second = (selection(half.mean(0).sqrt(), valid) for half in (squares[: K // 2], squares[K // 2 :]))
    return AttributionError(
        relative=relative[active].median().item(),
        agreement=((first & second).sum() / first.sum()).item(),
    )
