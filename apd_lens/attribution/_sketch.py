"""Projections of logits in the metric of their own distribution, without a pass through the unembedding for each.

In that metric (`fisher_coordinates`) v · z has the gradient √n Σ_o √p_o v_o (W_o − μ) at the input x of the
unembedding, logits = x W + b, with μ = Σ_o p_o W_o. With a large vocabulary this sum is most of the work of a
projection. Here the most probable outputs are taken as they are. Of the others some are drawn by their probability,
and stand for all of them: the mean over draws of the gradient's outer product, which squared attributions are made of,
is the same.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from apd_lens._memory import BUDGET, chunks
from apd_lens._processes import own
from apd_lens.attribution._linearity import edge, inputs, reached
from apd_lens.data._finite import on_gpu
from apd_lens.data._points import zero_at_padding
from apd_lens.passes._watch import WatchedPass

# So many of the most probable outputs, and so many drawn ones.
LIKELIEST = 96
DRAWN = 160
# With fewer outputs a pass through the unembedding is as quick.
FEWEST_OUTPUTS = 8 * (LIKELIEST + DRAWN)

# What zeros at padding are made by; besides what `reached` knows to be linear.
_ZEROS = frozenset({"MaskedFillBackward0"})


@dataclass(frozen=True, eq=False)
class Unembedding:
    """The matrix that a pass ends with: logits = x W + b at each position.

    Attributes:
        place: of x among `inputs` of the pass.
        x: in the graph.
        W: a view of the host's own numbers.
    """

    place: int
    x: Float[Tensor, "batch *pos d"]
    W: Float[Tensor, "d n_outputs"]


def unembedding(watched: WatchedPass) -> Unembedding | None:
    """What the pass ends with, if it is a large undecomposed matrix that all decomposed ones come through."""
    logits = watched.output
    if logits.grad_fn is None or logits.shape[-1] < FEWEST_OUTPUTS or not watched.others_after:
        return None
    use, x = watched.others_after[-1]
    if not x.requires_grad or x.shape[:-1] != logits.shape[:-1]:
        return None
    matrix = watched.run.target.weights[use.matrix]
    W = matrix.value()
    W = (W.mT if use.transposed else W)[use.rows, use.columns]
    if use.scale != 1 or matrix.bias is not None or W.shape != (x.shape[-1], logits.shape[-1]):
        return None
    root, ys = edge(logits), {edge(call.y) for call in watched.calls}
    linear, others = reached(root, {edge(x)}, also=_ZEROS)
    if edge(x) not in linear or edge(x) in others or ys & set().union(*reached(root, ys, without=edge(x))):
        return None
    return Unembedding(next(place for place, one in inputs(watched).items() if one is x), x, W)


def sketched(
    watched: WatchedPass,
    last: Unembedding,
    K: int,
    kind: Literal["rademacher", "normal"],
    generator: torch.Generator | None,
) -> Float[Tensor, "K batch *pos d"] | None:
    """The gradients of K projections at x; None where the gradient that autograd has there for p is not p Wᵀ.

    All K share the outputs that are drawn, and have v of their own.
    """
    logits, d = watched.output.detach(), last.x.shape[-1]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    n_examples, *positions, n_outputs = logits.shape
    p = logits.softmax(-1, dtype=dtype)
    (mu,) = torch.autograd.grad(watched.output, last.x, p.to(logits.dtype), retain_graph=True)
    mu = mu.reshape(-1, d).to(dtype)
    if not on_gpu(mu.device) and not _is_product(mu[:1], zero_at_padding(p, watched.valid).flatten(0, -2)[:1], last.W):
        return None
    # For the batch of all processes, so that each of them draws what one would.
    whole = watched.run.inputs.of_all
    shape, device = (whole.n_examples, *positions), p.device
    u = torch.rand(*shape, DRAWN, generator=generator, device=device, dtype=dtype)
    v_shape = (*shape, K, LIKELIEST + DRAWN)
    if kind == "normal":
        v = torch.randn(v_shape, generator=generator, device=device, dtype=dtype)
    else:
        v = torch.randint(2, v_shape, generator=generator, device=device, dtype=torch.int8).mul_(2).sub_(1)
    if whole is not watched.run.inputs:
        u, v = own(u), own(v)
    flat_p, flat_u, flat_v = p.view(-1, n_outputs), u.reshape(-1, DRAWN), v.reshape(-1, K, LIKELIEST + DRAWN)
    at_x, rows_of_W = logits.new_empty(K, len(flat_p), d, dtype=last.x.dtype), last.W.mT
    bytes_each = (2 * n_outputs + 2 * (LIKELIEST + DRAWN) * d) * dtype.itemsize
    for some in chunks(len(flat_p), bytes_each, BUDGET // 8):
        outputs, weights = _chosen(flat_p[some], flat_u[some])
        coefficients = flat_v[some] * (n_outputs**0.5 * weights)[:, None]
        of_chosen = coefficients @ F.embedding(outputs, rows_of_W).to(dtype)
        at_x[:, some] = (of_chosen - coefficients.sum(-1, keepdim=True) * mu[some, None]).movedim(1, 0).to(at_x.dtype)
    at_x = at_x.view(K, n_examples, *positions, d)
    return torch.stack([zero_at_padding(one, watched.valid) for one in at_x]) if watched.valid is not None else at_x


def _chosen(
    p: Float[Tensor, "data n_outputs"], u: Float[Tensor, "data drawn"]
) -> tuple[Int[Tensor, "data chosen"], Float[Tensor, "data chosen"]]:
    """Outputs, and √p of each: of the likeliest their own, of drawn ones that of all others together over their number.

    Args:
        u: uniform numbers, by which the others are drawn.
    """
    likeliest = p.topk(LIKELIEST, sorted=False)
    sums = p.scatter(-1, likeliest.indices, 0).cumsum(-1)
    left = sums[:, -1:].clone()
    drawn = torch.searchsorted(sums, u * left, right=True).clamp_max_(p.shape[-1] - 1)
    weights = torch.cat([likeliest.values, (left / DRAWN).expand(u.shape)], -1).sqrt()
    return torch.cat([likeliest.indices, drawn], -1), weights


def _is_product(mu: Tensor, p: Tensor, W: Tensor) -> bool:
    """Whether μ = p Wᵀ, give or take roundings."""
    expected = p @ W.mT.to(p.dtype)
    return bool((mu - expected).norm() <= 0.02 * expected.norm())
