"""How far each component is on, γ, where it does most harm: projected gradient ascent."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def ascend(
    errors_under: Callable[[Tensor], Tensor],
    hardest: Float[Tensor, "batch *pos units"],
    largest: Float[Tensor, " batch"],
    lowest: Float[Tensor, "*batch_pos units"],
    size: float,
    steps: int,
) -> tuple[Float[Tensor, "batch *pos units"], Float[Tensor, " batch"]]:
    """Steps of signed gradient ascent on γ, clamped to [lowest, 1]; the γ with the largest error that was met, for each
    example on its own, and that error.

    Args:
        errors_under: γ -> the error of each example.
        hardest, largest: where it starts, and the error there.

    Source: Madry et al. 2018.
    """
    gamma = hardest
    for _ in range(steps):
        error, gradient = with_gradient(errors_under, gamma)
        hardest, largest = harder(hardest, largest, gamma, error)
        gamma = torch.maximum(gamma + size * gradient.nan_to_num(0).sign(), lowest).clamp_max(1)
    with torch.no_grad():
        return harder(hardest, largest, gamma, errors_under(gamma))


def harder(
    hardest: Float[Tensor, "batch *pos units"],
    largest: Float[Tensor, " batch"],
    gamma: Float[Tensor, "batch *pos units"],
    error: Float[Tensor, " batch"],
) -> tuple[Float[Tensor, "batch *pos units"], Float[Tensor, " batch"]]:
    """Of two γ the one with the larger error, for each example, and that error."""
    is_harder = error > largest
    chosen = torch.where(is_harder.reshape(-1, *[1] * (gamma.ndim - 1)), gamma, hardest)
    return chosen, torch.maximum(error, largest)


def with_gradient(
    errors_under: Callable[[Tensor], Tensor], gamma: Float[Tensor, "batch *pos units"]
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch *pos units"]]:
    """The error of each example, and the gradient of their sum."""
    with torch.enable_grad():
        gamma = gamma.detach().requires_grad_()
        errors = errors_under(gamma)
        (gradient,) = torch.autograd.grad(errors.sum(), gamma)
    return errors.detach(), gradient
