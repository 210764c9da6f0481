"""Residual MLPs that compute more functions than they have neurons."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from apd_lens.metrics._mechanisms import neuron_contributions
from apd_lens.toys._shared import MLP, Data, batch_of_step, check_divides, fresh_data, train_with_adamw


class ResidualMLP(nn.Module):
    """r = x W_E; r = r + MLP(r) for each layer; y = r W_U. No biases; W_E has random rows of norm 1, W_U = W_Eᵀ."""

    def __init__(self, n_features: int, d_resid: int, n_neurons: int, n_layers: int):
        super().__init__()
        self.W_E = nn.Linear(n_features, d_resid, bias=False)
        self.layers = nn.ModuleList(MLP(d_resid, n_neurons, bias=False) for _ in range(n_layers))
        self.W_U = nn.Linear(d_resid, n_features, bias=False)
        rows = F.normalize(torch.randn(n_features, d_resid), dim=1)
        with torch.no_grad():
            self.W_E.weight.copy_(rows.mT)
            self.W_U.weight.copy_(rows)
            for mlp_in, mlp_out in self.matrices():
                mlp_in.normal_(std=d_resid**-0.5)
                mlp_out.normal_(std=n_neurons**-0.5)

    def matrices(self) -> list[tuple[Tensor, Tensor]]:
        """W_in `d_resid n_neurons` and W_out `n_neurons d_resid` of each layer, as views of the parameters."""
        mlps = [layer for layer in self.layers if isinstance(layer, MLP)]
        return [(mlp.mlp_in.weight.mT, mlp.mlp_out.weight.mT) for mlp in mlps]

    def forward(self, x: Float[Tensor, "batch n_features"]) -> Float[Tensor, "batch n_features"]:
        r = self.W_E(x)
        for layer in self.layers:
            r = r + layer(r)
        return self.W_U(r)

    def folded(self, x: Float[Tensor, "batch n_features"]) -> Float[Tensor, "batch n_features"]:
        """The same output, with the products of matrices computed first. No tensor has size batch × d_resid, so this is
        fast where d_resid is much larger than the number of features and neurons."""
        W_E, W_U = self.W_E.weight.mT, self.W_U.weight.mT
        y = x @ (W_E @ W_U)
        written: list[tuple[Tensor, Tensor]] = []  # post-ReLU activations and W_out of the layers so far
        for W_in, W_out in self.matrices():
            read = x @ (W_E @ W_in)
            for post, earlier in written:
                read = read + post @ (earlier @ W_in)
            post = torch.relu(read)
            y = y + post @ (W_out @ W_U)
            written.append((post, W_out))
        return y


def residual_mlp_data(
    batch_size: int, generator: torch.Generator, *, n_features: int = 100, probability: float = 0.01
) -> Float[Tensor, "batch n_features"]:
    """x_i ~ U[-1, 1] with the given probability, else 0."""
    # One draw for both, which takes half the time: below `probability` it is uniform again.
    u = torch.rand(batch_size, n_features, generator=generator)
    return torch.where(u < probability, u * (2 / probability) - 1, 0.0)


def residual_mlp_labels(x: Float[Tensor, "batch n_features"]) -> Float[Tensor, "batch n_features"]:
    """The labels that the residual MLP is trained on: x + relu(x)."""
    return x + torch.relu(x)


@dataclass(frozen=True, eq=False)
class ResidualMLPTarget:
    """A trained residual MLP.

    Attributes:
        model: frozen.
        weights: the matrices to decompose, those of the MLPs.
        data: number of data points, generator -> data points.
        loss: mean squared error on fresh data.
        contributions: how much each neuron does for each feature, with the neurons of all layers side by side; see
            `apd_lens.metrics.neuron_contributions`. It leaves out what a later layer reads from an earlier one.
    """

    model: ResidualMLP
    weights: list[str]
    data: Data
    loss: float
    contributions: Float[Tensor, "n_features neurons"]

    def batches(self, batch_size: int = 2048, seed: int = 0) -> Callable[[int], Tensor]:
        """A function step -> batch."""
        return partial(batch_of_step, self.data, batch_size, seed)


def train_residual_mlp(
    n_layers: int = 1,
    *,
    n_features: int = 100,
    d_resid: int = 1000,
    n_neurons: int = 50,
    probability: float = 0.01,
    steps: int = 10_000,
    batch_size: int = 2048,
    lr: float = 3e-3,
    seed: int = 0,
) -> ResidualMLPTarget:
    """Trains a residual MLP to compute x + relu(x), with AdamW and learning rate lr·cos(π/2 · progress), as in the
    paper.

    Args:
        n_neurons: number of neurons of all layers together.

    Raises:
        InvalidSetting: the layers cannot have the same number of neurons.
    """
    check_divides(n_neurons, n_layers, "n_neurons")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ResidualMLP(n_features, d_resid, n_neurons // n_layers, n_layers)
    data = partial(residual_mlp_data, n_features=n_features, probability=probability)
    model.W_E.requires_grad_(False)
    model.W_U.requires_grad_(False)
    loss_at = partial(_residual_mlp_loss, model, partial(batch_of_step, data, batch_size, seed))
    train_with_adamw(model.layers.parameters(), loss_at, steps, lr, decay=True)
    model.requires_grad_(False)

    W_E, W_U = model.W_E.weight.mT, model.W_U.weight.mT
    contributions = torch.cat([neuron_contributions(W_E, *layer, W_U) for layer in model.matrices()], 1)
    weights = [f"layers.{layer}.{side}.weight" for layer in range(n_layers) for side in ("mlp_in", "mlp_out")]
    x = fresh_data(data, seed)
    loss = F.mse_loss(model(x), residual_mlp_labels(x)).item()
    return ResidualMLPTarget(model, weights, data, loss, contributions)


def _residual_mlp_loss(model: ResidualMLP, batches: Callable[[int], Tensor], step: int) -> Tensor:
    x = batches(step)
    return F.mse_loss(model.folded(x), residual_mlp_labels(x))
