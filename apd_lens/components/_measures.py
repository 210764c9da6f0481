"""What components are: spectra, effective ranks, shares of heads and neurons, and random twins."""

import copy
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from apd_lens._block import full_precision, no_grad
from apd_lens.components._components import ParameterComponents
from apd_lens.components._factors import share_of_units


@no_grad()
@full_precision()
def random_components(components: ParameterComponents, seed: int = 0) -> ParameterComponents:
    """A null control: random components, each with the singular values of its counterpart in every matrix.

    They have the same norms and effective ranks; only their directions are random. Whatever you claim of the components
    should fail for these. So gates, too, read and say what random matrices of their singular values do.
    """
    generator = torch.Generator().manual_seed(seed)

    def random_orthonormal(like: Tensor) -> Tensor:
        noise = torch.randn(like.shape, generator=generator, dtype=like.dtype, device="cpu").to(like.device)
        return torch.linalg.qr(noise)[0]

    A, B = {}, {}
    for name in components.names:
        A[name] = random_orthonormal(components.A[name]) * singular_values(components, name)[:, None, :]
        B[name] = random_orthonormal(components.B[name].mT).mT
    gates = copy.deepcopy(components.gates)
    for values in [] if gates is None else [each for each in gates.parameters() if each.ndim == 2]:
        reads, singular, writes = torch.linalg.svd(values, full_matrices=False)
        values.copy_(random_orthonormal(reads) * singular @ random_orthonormal(writes.mT).mT)
    return ParameterComponents(A, B, gates).requires_grad_(False)


@no_grad()
@full_precision()
def singular_values(components: ParameterComponents, name: str) -> Float[Tensor, "C m"]:
    """Singular values of every component in one matrix, largest first.

    From the small matrix R_A R_Bᵀ of the factors' QR decompositions: A B = Q_A (R_A R_Bᵀ) Q_Bᵀ.
    """
    R_A = cast(Tensor, torch.linalg.qr(components.A[name], mode="r")[1])
    R_B = cast(Tensor, torch.linalg.qr(components.B[name].mT, mode="r")[1])
    return torch.linalg.svdvals(R_A @ R_B.mT)


@no_grad()
def output_share(components: ParameterComponents, name: str) -> Float[Tensor, "C d_out"]:
    """Each component's share of the squared weight of every output unit.

    ‖P_c[:, j]‖² / Σ_c ‖P_c[:, j]‖², in one matrix. Columns sum to 1.
    """
    return share_of_units(components.A[name], components.B[name])


@no_grad()
def input_share(components: ParameterComponents, name: str) -> Float[Tensor, "C d_in"]:
    """Each component's share of the squared weight of every input unit: `output_share` for the rows P_c[i, :]."""
    return share_of_units(components.B[name].mT, components.A[name].mT)


def effective_rank(singular_values: Float[Tensor, "C m"]) -> Float[Tensor, " C"]:
    """exp of the entropy of σ / Σσ: 1 for a rank-one matrix, r for r equal singular values, 0 for the zero matrix.

    Source: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    total = singular_values.sum(-1, keepdim=True)
    share = singular_values / total.clamp_min(torch.finfo(singular_values.dtype).tiny)
    return torch.special.entr(share).sum(-1).exp() * (total[:, 0] > 0)
