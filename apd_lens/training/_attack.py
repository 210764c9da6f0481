"""How far what is inactive is on where that does most harm, found by gradient ascent beside the training."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from apd_lens._draws import draws

# More data points share what they have found.
_MOST = 4096
_LR, _BETAS = 1e-2, (0.5, 0.99)


@dataclass(frozen=True, eq=False)
class Attack:
    """Shares in [0, 1] for each inactive component and, last, for the rest, of each place of a batch. They stay from
    step to step, and each step's gradient moves them up as it moves the components down.

    Source: public notes on adversarial masks in the successors of the method; Adam is theirs too.
    """

    shares: Float[Tensor, "places units"]
    optimizer: torch.optim.Optimizer

    @staticmethod
    def starting(shares: Float[Tensor, "places units"]) -> "Attack":
        shares = shares.detach().clone().requires_grad_()
        return Attack(shares, torch.optim.Adam([shares], lr=_LR, betas=_BETAS, maximize=True))

    @staticmethod
    def drawn(n_data_points: int, n_units: int, like: Tensor, seed: int) -> "Attack":
        """From uniform shares."""
        size = (min(n_data_points, _MOST), n_units)
        shares = torch.rand(size, generator=draws(seed, 0, "attack"), dtype=torch.float32, device="cpu")
        return Attack.starting(shares.to(like))

    def of(self, data_points: torch.Size) -> Float[Tensor, "batch *pos units"]:
        """The shares of each data point of a batch."""
        n = data_points.numel()
        places = torch.arange(n, device=self.shares.device) % len(self.shares)
        return self.shares[places].unflatten(0, data_points)

    def ascend(self) -> None:
        """Moves the shares up the gradient that they have."""
        self.optimizer.step()
        with torch.no_grad():
            self.shares.clamp_(0, 1)
