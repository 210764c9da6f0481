"""Masks that are drawn: path masks, scrubbed and anti-scrubbed ones."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apd_lens._checks import checked


def path_mask(
    mask: Float[Tensor, "batch *pos C"] | Bool[Tensor, "batch *pos C"], generator: torch.Generator | None = None
) -> Float[Tensor, "batch *pos C"]:
    """γ_c drawn between s_c and 1: active components stay on, every other is left on by a random amount.

    The model's output under it must equal the target's if inactive components are to be inactive in the strict
    sense, where no partial ablation of them in any combination matters.
    """
    dtype = mask.dtype if mask.is_floating_point() else torch.float32
    amounts = torch.rand(mask.shape, generator=generator, dtype=dtype, device=mask.device)
    return torch.maximum(mask.to(dtype), amounts)


@checked
def scrubbed_mask(
    responsible: Bool[Tensor, "batch *pos C"], generator: torch.Generator | None = None
) -> Bool[Tensor, "batch *pos C"]:
    """The responsible components of each data point, and a random half of all others.

    Each other one is kept with probability 1/2 on its own. If only the responsible matter, the output under this mask
    is as good as under theirs: `with decomposition.sparse(mask): model(x)`.

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
    """A random half of the components that are not responsible, without those that are.

    With the same generator state it is `scrubbed_mask` less the responsible ones. The output should be as bad as with
    nothing on. Arguments and source as of `scrubbed_mask`.
    """
    return ~responsible & _half(responsible, generator)


def _half(like: Bool[Tensor, "batch *pos C"], generator: torch.Generator | None) -> Bool[Tensor, "batch *pos C"]:
    return torch.rand(like.shape, generator=generator, device=like.device, dtype=torch.float32) < 0.5
