"""Components that do what the weights do, each for its own inputs: ridge regression in a metric, cut to rank m."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apd_lens._memory import fitting

# What a regression may leave undone, as a share of the mean squared length of a row in its metric.
RIDGE = 1e-3


def dual_basis(
    rows: Float[Tensor, "rows d"],
    weights: Float[Tensor, " rows"],
    metric: Float[Tensor, "d d"],
    ridge: float = RIDGE,
) -> Float[Tensor, "rows d"]:
    """D = (ε G + Rᵀ w² R)⁻¹ Rᵀ w², transposed: x_r D_sᵀ is 1 for r = s and nearly 0 else, where rows are independent.

    Of all D with that property it is the one with the least Tr D G Dᵀ, so it does little to inputs with second moments
    G. ε is `ridge` times the mean of w_r² x_r G⁻¹ x_rᵀ. The smaller of `rows rows` and `d d` is inverted.

    Args:
        metric: G, positive definite.
    """
    L = torch.linalg.cholesky(metric)
    Z = weights[:, None] * torch.linalg.solve_triangular(L, rows.mT, upper=False).mT
    gram = Z @ Z.mT if len(Z) <= Z.shape[1] else Z.mT @ Z
    mean = Z.square().sum() / len(Z)
    gram.diagonal().add_(ridge * mean + torch.finfo(Z.dtype).tiny)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    dual = inverse @ Z if len(Z) <= Z.shape[1] else Z @ inverse
    return weights[:, None] * torch.linalg.solve_triangular(L.mT, dual.mT, upper=True).mT


def groups_at_once(groups: Int[Tensor, " rows"], d: int, memory: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """Groups of about as many rows each, as pairs: their numbers `groups`, and their rows `groups most`, -1 for none.

    Args:
        d: numbers of a row, by which so many groups are put together as fit into the memory.
    """
    numbers, counts = groups.unique(return_counts=True)
    order = groups.argsort(stable=True)
    firsts = counts.cumsum(0) - counts
    found = []
    for size in (2 ** counts.double().log2().ceil()).long().unique().tolist():
        alike = ((counts <= size) & (2 * counts > size)).nonzero()[:, 0]
        for some in alike.split(fitting(4 * 8 * size * d, memory)):
            places = torch.arange(int(counts[some].max()), device=groups.device).expand(len(some), -1)
            inside = places < counts[some, None]
            found.append((numbers[some], torch.where(inside, order[(firsts[some, None] + places) * inside], -1)))
    return found


def padded_rows(rows: Float[Tensor, "rows d"], picked: Int[Tensor, "groups most"]) -> Float[Tensor, "groups most d"]:
    """The rows of each group, zeros where there is none."""
    return rows[picked.clamp_min(0)].masked_fill((picked < 0)[..., None], 0)


def truncated(
    left: Float[Tensor, "groups d_in rows"],
    right: Float[Tensor, "groups rows d_out"],
    weights: Float[Tensor, "groups rows"],
    m: int,
) -> tuple[Float[Tensor, "groups d_in k"], Float[Tensor, "groups k d_out"]]:
    """Each left @ right on the m output directions V that keep most of `weights * right`: left @ right @ V and Vᵀ.

    Where `left` is a dual basis, right_r is what input r is mapped to; so no other matrix of rank m loses less of what
    its inputs are mapped to, weighted. Columns and rows have equal size; k is at most m.
    """
    _, _, Vh = torch.linalg.svd(weights[..., None] * right, full_matrices=False)
    V = Vh[:, :m].mT
    A = left @ (right @ V)
    root = A.norm(dim=1).sqrt()
    return A / root.clamp_min(torch.finfo(A.dtype).tiny)[:, None], root[..., None] * V.mT
