"""How well the output of a changed model agrees with the target's."""

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from apd_lens._checks import checked
from apd_lens.losses._outputs import kl_divergence


@dataclass(frozen=True)
class Agreement:
    """How well two outputs agree.

    Attributes:
        mse: mean over data points and outputs of the squared difference.
        kl: mean over data points of KL(softmax(target) ‖ softmax(other)), in nats; meaningful only if outputs are
            logits.
        top1: share of data points on which both have the same largest output.
    """

    mse: float
    kl: float
    top1: float


@checked
def agreement(
    target_output: Float[Tensor, "*data_points n_outputs"], output: Float[Tensor, "*data_points n_outputs"]
) -> Agreement:
    """Mean squared error, KL divergence and top-1 agreement of an output with the target's."""
    return Agreement(
        mse=F.mse_loss(output, target_output).item(),
        kl=kl_divergence(target_output, output).mean().item(),
        top1=(output.argmax(-1) == target_output.argmax(-1)).float().mean().item(),
    )
