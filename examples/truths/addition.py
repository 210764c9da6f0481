"""Addition modulo a prime, in a network that has to generalise, and does it with a few frequencies."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from apd_lens.errors import InvalidSetting
from apd_lens.toys._shared import batch_of_step


class AdditionMLP(nn.Module):
    """y = relu((E[a] + E[b]) W_in) W_out, without biases."""

    def __init__(self, modulus: int, width: int, n_neurons: int):
        super().__init__()
        self.embed = nn.Embedding(modulus, width)
        self.mlp_in = nn.Linear(width, n_neurons, bias=False)
        self.act = nn.ReLU()
        self.mlp_out = nn.Linear(n_neurons, modulus, bias=False)
        nn.init.normal_(self.embed.weight, std=width**-0.5)

    def forward(self, pairs: Int[Tensor, "batch 2"]) -> Float[Tensor, "batch modulus"]:
        return self.mlp_out(self.act(self.mlp_in(self.embed(pairs).sum(1))))


@dataclass(frozen=True, eq=False)
class AdditionTarget:
    """A network that adds. A mechanism is all that it does at one frequency.

    Attributes:
        model: frozen.
        weights: the matrices to decompose, all of them.
        pairs: all pairs of summands.
        trained: which pairs it was trained on.
        loss: cross-entropy over the others.
        power: share of each frequency from 0 in the weights, see `frequency_power`.
    """

    model: AdditionMLP
    weights: list[str]
    pairs: Int[Tensor, "pairs 2"]
    trained: Bool[Tensor, " pairs"]
    loss: float
    power: Float[Tensor, " frequencies"]

    def batches(self, batch_size: int = 256, seed: int = 0) -> Callable[[int], Tensor]:
        """A function step -> batch: pairs drawn with replacement."""
        return partial(batch_of_step, self._draw, batch_size, seed)

    def _draw(self, n: int, generator: torch.Generator) -> Int[Tensor, "n 2"]:
        return self.pairs[torch.randint(len(self.pairs), (n,), generator=generator)]

    @property
    def key_frequencies(self) -> Int[Tensor, " keys"]:
        """Frequencies, without 0, that have more than an even share of the power, the largest first."""
        order = self.power[1:].argsort(descending=True) + 1
        return order[self.power[order] > self.power[1:].mean()]

    def is_right(self) -> Bool[Tensor, " pairs"]:
        """Which pairs the model, as it is at the moment, adds rightly."""
        return self.model(self.pairs).argmax(1) == self.pairs.sum(1) % self.model.embed.num_embeddings


def frequency_power(
    E: Float[Tensor, "*C modulus width"],
    W_in: Float[Tensor, "*C width neurons"],
    W_out: Float[Tensor, "*C neurons modulus"],
    model: AdditionMLP,
) -> Float[Tensor, "*C frequencies"]:
    """Share of each frequency in matrices that are the model's, or a component's part of them: Σ over numbers j of
    exp(2πi f j / modulus), squared, of E, of E W_in with the model's E, and of W_outᵀ.

    Each of the three is divided by what the model has in it at all frequencies, and the mean over the three is taken.
    So the shares of the model sum to 1.
    """
    whole = (model.embed.weight, model.embed.weight @ model.mlp_in.weight.mT, model.mlp_out.weight)
    parts = (E, model.embed.weight @ W_in, W_out.mT)
    shares = [_power(part) / _power(full).sum() for part, full in zip(parts, whole, strict=True)]
    return torch.stack(shares).mean(0)


def _power(of_numbers: Float[Tensor, "*C modulus columns"]) -> Float[Tensor, "*C frequencies"]:
    """|Fourier transform|² over the numbers; every frequency but 0 stands for itself and its negative."""
    power = torch.fft.rfft(of_numbers, dim=-2).abs().square().sum(-1)
    return torch.cat([power[..., :1], 2 * power[..., 1:]], -1)


def train_addition(
    modulus: int = 47,
    width: int = 24,
    n_neurons: int = 64,
    *,
    share: float = 0.7,
    steps: int = 4000,
    lr: float = 5e-3,
    weight_decay: float = 1.0,
    seed: int = 0,
) -> AdditionTarget:
    """Trains a network to add modulo an odd number on a share of all pairs, in cross-entropy, with AdamW.

    Weight decay makes it generalise to the other pairs and use few frequencies.

    Args:
        share: of the pairs, drawn at random.

    Raises:
        InvalidSetting: an even modulus, or a share that leaves no pairs.
    """
    n_trained = int(share * modulus**2)
    if modulus % 2 == 0 or not 0 < n_trained < modulus**2:
        raise InvalidSetting(f"Expected an odd modulus and 0 < share < 1, got modulus={modulus}, share={share}.")
    pairs = torch.cartesian_prod(torch.arange(modulus), torch.arange(modulus))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AdditionMLP(modulus, width, n_neurons)
        trained = torch.zeros(len(pairs), dtype=torch.bool)
        trained[torch.randperm(len(pairs))[:n_trained]] = True
    sums = pairs.sum(1) % modulus
    known, answers = pairs[trained], sums[trained]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98), fused=True)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(known), answers).backward()
        optimizer.step()
    model.requires_grad_(False)
    loss = F.cross_entropy(model(pairs[~trained]), sums[~trained]).item()
    power = frequency_power(model.embed.weight, model.mlp_in.weight.mT, model.mlp_out.weight.mT, model)
    weights = ["embed.weight", "mlp_in.weight", "mlp_out.weight"]
    return AdditionTarget(model, weights, pairs, trained, loss, power)
