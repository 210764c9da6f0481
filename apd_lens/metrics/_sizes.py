"""How many components, how large, and how many bits they take."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apd_lens._block import full_precision
from apd_lens._checks import checked
from apd_lens.components._components import ParameterComponents
from apd_lens.components._measures import singular_values


@checked
def layer_share(components: ParameterComponents) -> Float[Tensor, "C matrices"]:
    """‖P_c,l‖² / Σ_l ‖P_c,l‖²: the share of each component's squared norm in each matrix.

    Matrices in the order of `components.names`. Rows sum to 1; a component of norm 0 has zeros.
    """
    squares = torch.stack([singular_values(components, name).square().sum(1) for name in components.names], 1)
    return squares / squares.sum(1, keepdim=True).clamp_min(torch.finfo(squares.dtype).tiny)


@checked
def ranks(components: ParameterComponents, tolerance: float = 0.01) -> Float[Tensor, "C matrices"]:
    """rank P_c,l: the number of singular values above a tolerance, of each component in each matrix.

    Matrices in the order of `components.names`.

    Args:
        tolerance: a singular value counts if it exceeds this share of the largest one that any component has in the
            matrix. So noise in a component that does nothing there is not counted.
    """
    spectra = [singular_values(components, name) for name in components.names]
    return torch.stack([(spectrum > tolerance * spectrum.max()).sum(1) for spectrum in spectra], 1).to(spectra[0].dtype)


@dataclass(frozen=True)
class DescriptionLength:
    """Bits that say which components are active on a data point, and what these components are; mean over data points.

    Attributes:
        selection: Σ_c s_c log2 C.
        parameters: α Σ_c s_c Σ_l rank P_c,l.
        alpha: α, bits for each rank-one part.
    """

    selection: float
    parameters: float
    alpha: float

    @property
    def total(self) -> float:
        return self.selection + self.parameters

    def __str__(self) -> str:
        return (
            f"{self.total:.4g} bits a data point: {self.selection:.4g} for which components, {self.parameters:.4g} for "
            f"their ranks (α = {self.alpha:.4g} bits)"
        )


@checked
@full_precision()
def description_length(
    mask: Bool[Tensor, "batch *pos C"], rank: Float[Tensor, " C"], alpha: float
) -> DescriptionLength:
    """Σ_c s_c (log2 C + α Σ_l rank P_c,l) bits, mean over data points.

    Args:
        rank: the rank of each component over all matrices, such as `ranks(components).sum(1)` or the sum of
            effective ranks.
        alpha: α, bits for each rank-one part. The paper leaves it open, so both terms are given.

    Source: the minimal mechanistic description length that the paper starts from.

    >>> print(description_length(torch.eye(8).bool(), torch.full((8,), 2.0), alpha=1.5))
    6 bits a data point: 3 for which components, 3 for their ranks (α = 1.5 bits)
    """
    active = mask.flatten(0, -2).to(rank.dtype)
    n_active = active.sum(1).mean()
    return DescriptionLength(
        selection=(n_active * torch.tensor(float(active.shape[1]), dtype=torch.float32, device="cpu").log2()).item(),
        parameters=alpha * (active @ rank).mean().item(),
        alpha=alpha,
    )
