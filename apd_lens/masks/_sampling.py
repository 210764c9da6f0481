"""Masks that are drawn: path masks, scrubbed and anti-scrubbed ones."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apd_lens._checks import checked
from apd_lens._memory import chunks


def path_mask(
    mask: Float[Tensor, "batch *pos C"] | Bool[Tensor, "batch *pos C"],
    generator: torch.Generator | None = None,
    bare: float = 0.0,
) -> Float[Tensor, "batch *pos C"]:
    """γ_c drawn between s_c and 1: active components stay on, and each other one is on by a random amount.

    Inactive components are inactive in the strict sense if no partial ablation of them, in any combination, changes the
    output. Then the model's output under this mask equals the target's.

    Args:
        bare: probability that none of the others is on, for each example.
    """
    dtype = mask.dtype if mask.is_floating_point() else torch.float32
    amounts = torch.rand(mask.shape, generator=generator, dtype=dtype, device=mask.device)
    if bare:
        drawn = torch.rand(len(mask), generator=generator, dtype=dtype, device=mask.device)
        amounts *= (drawn >= bare).to(dtype).reshape(-1, *[1] * (mask.ndim - 1))
    return torch.maximum(mask.to(dtype), amounts)


def random_subsets(sizes: Float[Tensor, "n 1"], order: Float[Tensor, "n M"]) -> Bool[Tensor, "n M"]:
    """Subsets of M things, each size from 1 to M being as likely, from uniform numbers that say how many and which."""
    return order.argsort(1).argsort(1) < 1 + (order.shape[1] * sizes).long()


@checked
def scrubbed_mask(
    responsible: Bool[Tensor, "batch *pos C"], generator: torch.Generator | None = None
) -> Bool[Tensor, "batch *pos C"]:
    """The responsible components of each data point, and a random half of all others.

    Each of the others is kept with probability 1/2, independently. If only the responsible components matter, the
    output under this mask is as good as under theirs: `with decomposition.sparse(mask): model(x)`.

    Args:
        responsible: which components should matter, from the selection or from the truth.
        generator: on the mask's device.

    Source: the paper's residual MLPs, after causal scrubbing.
    """
    return responsible | _half(responsible, generator)


@checked
def anti_scrubbed_mask(
    responsible: Bool[Tensor, "batch *pos C"], generator: torch.Generator | None = None
) -> Bool[Tensor, "batch *pos C"]:
    """A random half of the components that are not responsible, and none of those that are.

    From the same generator state this is `scrubbed_mask` without the responsible components. The output should be as
    bad as with no component on. Arguments and source as of `scrubbed_mask`.
    """
    return ~responsible & _half(responsible, generator)


def _half(like: Bool[Tensor, "batch *pos C"], generator: torch.Generator | None) -> Bool[Tensor, "batch *pos C"]:
    return torch.rand(like.shape, generator=generator, device=like.device, dtype=torch.float32) < 0.5


def usage_matched(
    active: Bool[Tensor, "data C"], generator: torch.Generator | None = None, within: float = 2.0
) -> tuple[Bool[Tensor, "data C"], Bool[Tensor, "data C"]]:
    """For each active component of a data point another one that is not active there, and is as often active on all.

    The most often active one finds its partner first, the one whose number of data points is nearest; of equally near
    ones, any.

    Args:
        within: the larger number over the smaller, at most. A component without such a partner is left out.
        generator: on the CPU.

    Returns:
        The active ones that have a partner, and the partners.
    """
    usage = active.sum(0).float()
    own, partners = torch.zeros_like(active), torch.zeros_like(active)
    log_usage, furthest = usage.log(), math.log(within)
    for part in chunks(len(active), 32 * len(usage)):
        left = active[part].clone()
        rows = torch.arange(len(left), device=active.device)
        while bool(left.any()):
            first = torch.where(left, usage, -1).argmax(1)
            found = left.any(1)
            left[rows, first] = False
            apart = (log_usage[first][:, None] - log_usage).abs()
            apart += 1e-6 * torch.rand(apart.shape, generator=generator, dtype=torch.float32, device="cpu").to(apart)
            nearest, partner = apart.masked_fill(active[part] | partners[part], torch.inf).min(1)
            found &= nearest <= furthest + 1e-5
            own[part][rows[found], first[found]] = True
            partners[part][rows[found], partner[found]] = True
    return own, partners
