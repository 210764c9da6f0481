"""Masks that are drawn: path masks, scrubbed and anti-scrubbed ones."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apd_lens._checks import checked


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
