"""Boolean gates in a network that has too few neurons to keep them apart."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from apd_lens.errors import InvalidSetting
from apd_lens.toys._shared import Data, batch_of_step, fresh_data, train_with_adamw

# The outputs of XOR, AND and OR for the bits 00, 01, 10 and 11.
TABLES = ((0, 1, 1, 0), (0, 0, 0, 1), (0, 1, 1, 1))


def gate_bits(
    batch_size: int,
    generator: torch.Generator,
    *,
    pairs: Int[Tensor, "gate 2"],
    n_inputs: int,
    probability: float = 0.05,
) -> Float[Tensor, "batch n_inputs"]:
    """Each gate is asked with the given probability, and turns on one of its two bits or both. All other bits are 0."""
    pattern = torch.randint(1, 4, (batch_size, len(pairs)), generator=generator)
    pattern *= torch.rand(batch_size, len(pairs), generator=generator) < probability
    asked = torch.stack([pattern // 2, pattern % 2], -1).flatten(1).float()
    return torch.zeros(batch_size, n_inputs).scatter_reduce(1, pairs.flatten().expand_as(asked), asked, "amax")


def gate_values(
    bits: Float[Tensor, "batch n_inputs"], pairs: Int[Tensor, "gate 2"], tables: Float[Tensor, "gate 4"]
) -> Float[Tensor, "batch gate"]:
    """What the gates make of the bits.

    >>> gate_values(torch.tensor([[1.0, 1.0]]), torch.tensor([[0, 1], [1, 0]]), torch.tensor(TABLES[:2]).float())
    tensor([[0., 1.]])
    """
    first, second = bits[:, pairs].long().unbind(2)
    return tables[torch.arange(len(tables)), 2 * first + second]


@dataclass(frozen=True, eq=False)
class BooleanTarget:
    """A trained network of Boolean gates. A mechanism is all that it does for one gate.

    Attributes:
        model: W_in, ReLU, W_out, with biases; frozen. Output g is that of gate g.
        weights: the matrices to decompose.
        data: number of data points, generator -> data points.
        loss: mean squared error on fresh data.
        pairs: the two inputs of each gate.
        tables: the output of each gate for the bits 00, 01, 10 and 11.
    """

    model: nn.Module
    weights: list[str]
    data: Data
    loss: float
    pairs: Int[Tensor, "gate 2"]
    tables: Float[Tensor, "gate 4"]

    def batches(self, batch_size: int = 512, seed: int = 0) -> Callable[[int], Tensor]:
        """A function step -> batch."""
        return partial(batch_of_step, self.data, batch_size, seed)

    def labels(self, bits: Float[Tensor, "batch n_inputs"]) -> Float[Tensor, "batch gate"]:
        """What the gates make of the bits."""
        return gate_values(bits, self.pairs, self.tables)

    def is_right(self, bits: Float[Tensor, "batch n_inputs"]) -> Bool[Tensor, "batch gate"]:
        """Which gates the model, as it is at the moment, answers rightly, with 0.5 between 0 and 1."""
        return (self.model(bits) > 0.5) == (self.labels(bits) > 0.5)


def train_boolean(
    n_gates: int = 16,
    n_inputs: int = 24,
    n_neurons: int = 20,
    *,
    pairs: Int[Tensor, "gate 2"] | None = None,
    probability: float = 0.05,
    steps: int = 8000,
    batch_size: int = 512,
    lr: float = 2e-2,
    seed: int = 0,
) -> BooleanTarget:
    """Trains a network of one hidden layer to compute random gates: a third each of XOR, AND and OR of two inputs.

    By itself an XOR needs two neurons, and an AND or an OR one; so 16 gates need 22. Mean squared error, AdamW,
    learning rate lr·cos(π/2 · progress).

    Args:
        pairs: the inputs of each gate; default different random pairs, which may share an input.
        probability: that a gate is asked, see `gate_bits`.

    Raises:
        InvalidSetting: there are fewer pairs of inputs than gates.
    """
    possible = torch.tensor(list(combinations(range(n_inputs), 2)))
    if n_gates > len(possible):
        raise InvalidSetting(f"{n_inputs} inputs make {len(possible)} pairs, too few for n_gates={n_gates}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tables = torch.tensor(TABLES).float()[torch.randperm(n_gates) % len(TABLES)]
        model = nn.Sequential(nn.Linear(n_inputs, n_neurons), nn.ReLU(), nn.Linear(n_neurons, n_gates))
        if pairs is None:
            pairs = possible[torch.randperm(len(possible))[:n_gates]]
    data = partial(gate_bits, pairs=pairs, n_inputs=n_inputs, probability=probability)

    def loss_of(bits: Tensor) -> Tensor:
        return F.mse_loss(model(bits), gate_values(bits, pairs, tables))

    train_with_adamw(
        model.parameters(), lambda step: loss_of(batch_of_step(data, batch_size, seed, step)), steps, lr, decay=True
    )
    model.requires_grad_(False)
    loss = loss_of(fresh_data(data, seed)).item()
    return BooleanTarget(model, ["0.weight", "2.weight"], data, loss, pairs, tables)
