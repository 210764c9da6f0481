"""What the toy systems share: data, training, checks."""

import math
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apd_lens._errors import InvalidSetting

# Number of data points and a generator on the CPU -> that many data points.
Data = Callable[[int, torch.Generator], Tensor]


class MLP(nn.Module):
    """mlp_out(relu(mlp_in(r))). The submodule `act` gives the post-ReLU activations."""

    def __init__(self, d_resid: int, n_neurons: int, bias: bool):
        super().__init__()
        self.mlp_in = nn.Linear(d_resid, n_neurons, bias=bias)
        self.act = nn.ReLU()
        self.mlp_out = nn.Linear(n_neurons, d_resid, bias=False)

    def forward(self, r: Float[Tensor, "*batch d_resid"]) -> Float[Tensor, "*batch d_resid"]:
        return self.mlp_out(self.act(self.mlp_in(r)))


def batch_of_step(data: Data, batch_size: int, seed: int, step: int) -> Tensor:
    # Of a seed the CPU's generator takes 32 bits; a prime keeps the steps of small seeds apart.
    return data(batch_size, torch.Generator().manual_seed(seed * 1_000_003 + step))


def fresh_data(data: Data, seed: int) -> Tensor:
    """Data points that no step has seen."""
    return batch_of_step(data, 2**14, seed, -1)


def train_with_adamw(
    parameters: Iterable[Tensor], loss_at: Callable[[int], Tensor], steps: int, lr: float, decay: bool = False
) -> None:
    """AdamW with weight decay 0.01; with `decay`, the learning rate is lr·cos(π/2 · progress)."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, fused=True)
    for step in range(steps):
        if decay:
            optimizer.param_groups[0]["lr"] = lr * math.cos(math.pi / 2 * step / steps)
        optimizer.zero_grad()
        loss_at(step).backward()
        optimizer.step()


def group_size(n_features: int, co_occurring: bool) -> int:
    if co_occurring and n_features % 2:
        raise InvalidSetting(f"co_occurring=True pairs features, so n_features must be even, got {n_features}.")
    return 2 if co_occurring else 1


def check_divides(number: int, n_layers: int, name: str) -> None:
    if n_layers < 1 or number < n_layers or number % n_layers:
        raise InvalidSetting(
            f"{name} must be a multiple of n_layers, so that every layer has the same number; got {name}={number} and "
            f"n_layers={n_layers}."
        )
