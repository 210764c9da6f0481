"""Gated functions, written into a network by hand."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from apd_lens._errors import InvalidSetting
from apd_lens.toys._shared import MLP, Data, batch_of_step, check_divides, fresh_data

# The inputs of gated functions lie between 0 and this.
X_MAX = 5.0


class GatedFunctions(nn.Module):
    """r = [x, control bits, 0]; r = r + MLP(r) for each layer; y is the last entry of r."""

    def __init__(self, n_functions: int, n_neurons: int, n_layers: int):
        super().__init__()
        self.layers = nn.ModuleList(MLP(n_functions + 2, n_neurons, bias=True) for _ in range(n_layers))

    def forward(self, x: Float[Tensor, "batch inputs"]) -> Float[Tensor, "batch 1"]:
        r = F.pad(x, (0, 1))
        for layer in self.layers:
            r = r + layer(r)
        return r[:, -1:]


def gated_data(
    batch_size: int, generator: torch.Generator, *, n_functions: int = 4, probability: float = 0.05
) -> Float[Tensor, "batch inputs"]:
    """x ~ U[0, 5], then the control bits, each 1 with the given probability, else 0."""
    x = X_MAX * torch.rand(batch_size, 1, generator=generator)
    bits = torch.rand(batch_size, n_functions, generator=generator) < probability
    return torch.cat([x, bits.to(x.dtype)], 1)


def piecewise_linear(
    x: Float[Tensor, " batch"], values: Float[Tensor, "n_functions knots"]
) -> Float[Tensor, "batch n_functions"]:
    """Piecewise-linear functions through the given values, at knots spread evenly from 0 to 5.

    >>> piecewise_linear(torch.tensor([1.25, 5.0]), torch.tensor([[0.0, 1.0, 4.0]]))
    tensor([[0.5000],
            [4.0000]])
    """
    n_pieces = values.shape[1] - 1
    place = x * (n_pieces / X_MAX)
    piece = place.long().clamp(0, n_pieces - 1)
    start, end = values[:, piece], values[:, piece + 1]
    return (start + (place - piece) * (end - start)).mT


def gated_labels(
    x: Float[Tensor, "batch inputs"], values: Float[Tensor, "n_functions knots"]
) -> Float[Tensor, "batch 1"]:
    """Σ of the piecewise-linear functions whose control bit is on."""
    return (x[:, 1:] * piecewise_linear(x[:, 0], values)).sum(1, keepdim=True)


@dataclass(frozen=True, eq=False)
class GatedTarget:
    """Hand-coded gated functions.

    Attributes:
        model: frozen.
        weights: the matrices to decompose. Biases are not among them.
        data: number of data points, generator -> data points.
        loss: mean squared error against `gated_labels` on fresh data; it comes from rounding alone.
        values: values of the coded functions at their knots.
        owned: name -> `n_functions d_in d_out`, True where a weight belongs to a function. A zero weight belongs to
            none.
        mechanisms: name -> `n_functions d_in d_out`, the weights that each function owns; they sum to the matrix.
    """

    model: GatedFunctions
    weights: list[str]
    data: Data
    loss: float
    values: Float[Tensor, "n_functions knots"]
    owned: dict[str, Tensor]
    mechanisms: dict[str, Tensor]

    def batches(self, batch_size: int = 10_000, seed: int = 0) -> Callable[[int], Tensor]:
        """A function step -> batch."""
        return partial(batch_of_step, self.data, batch_size, seed)


def make_gated_functions(
    n_functions: int = 4,
    *,
    neurons_per_function: int = 10,
    n_layers: int = 2,
    probability: float = 0.05,
    seed: int = 0,
) -> GatedTarget:
    """Builds gated functions by hand. Each is a piecewise-linear fit of a random cosine plus sine.

    f(x) = a cos(b x + c) + d sin(e x + g) with a, d ~ U[-1, 1], b, e ~ U[0.5, 2] and c, g ~ U[0, 2π], fitted at knots
    t_j spread evenly from 0 to 5. A function has one neuron relu(bit), which writes f(0), and for every piece a neuron
    relu(x − t_j + 5 (bit − 1)), which writes the change of slope at t_j and is off for every x where the bit is 0. Its
    neurons are shared out at random among the layers, the same number to each.

    Raises:
        InvalidSetting: fewer than two neurons a function, or a number that cannot be shared out evenly.
    """
    check_divides(neurons_per_function, n_layers, "neurons_per_function")
    if neurons_per_function < 2:
        raise InvalidSetting(f"neurons_per_function must be at least 2, got {neurons_per_function}.")
    generator = torch.Generator().manual_seed(seed)
    knots = torch.linspace(0, X_MAX, neurons_per_function)
    values = _random_waves(n_functions, knots, generator)
    slopes = values.diff(dim=1) / knots.diff()
    written = torch.cat([values[:, :1], slopes.diff(dim=1, prepend=torch.zeros(n_functions, 1))], 1)
    order = torch.rand(n_functions, neurons_per_function, generator=generator).argsort(1)

    each = neurons_per_function // n_layers
    model = GatedFunctions(n_functions, n_functions * each, n_layers).requires_grad_(False)
    owned: dict[str, Tensor] = {}
    for index, (layer, chosen) in enumerate(zip(model.layers, order.split(each, dim=1), strict=True)):
        assert isinstance(layer, MLP)
        for parameter in layer.parameters():
            parameter.zero_()
        function = torch.arange(n_functions).repeat_interleave(each)
        neuron, unit = torch.arange(len(function)), chosen.flatten()  # a neuron's place in the layer, in its function
        is_piece = unit > 0
        layer.mlp_in.weight[neuron, 0] = is_piece.float()
        layer.mlp_in.weight[neuron, 1 + function] = torch.where(is_piece, X_MAX, 1.0)
        layer.mlp_in.bias[:] = torch.where(is_piece, -knots[unit - 1] - X_MAX, 0.0)
        layer.mlp_out.weight[-1] = written[function, unit]
        holds = function == torch.arange(n_functions)[:, None]
        owned[f"layers.{index}.mlp_in.weight"] = (layer.mlp_in.weight.mT != 0) & holds[:, None, :]
        owned[f"layers.{index}.mlp_out.weight"] = (layer.mlp_out.weight.mT != 0) & holds[:, :, None]

    mechanisms = {name: mask * model.get_parameter(name).mT for name, mask in owned.items()}
    data = partial(gated_data, n_functions=n_functions, probability=probability)
    x = fresh_data(data, seed)
    loss = F.mse_loss(model(x), gated_labels(x, values)).item()
    return GatedTarget(model, list(owned), data, loss, values, owned, mechanisms)


def _random_waves(
    n_functions: int, x: Float[Tensor, " knots"], generator: torch.Generator
) -> Float[Tensor, "n_functions knots"]:
    """a cos(b x + c) + d sin(e x + g), at the given x."""
    u = torch.rand(6, n_functions, 1, generator=generator)
    a, d = 2 * u[:2] - 1
    b, e = 0.5 + 1.5 * u[2:4]
    c, g = 2 * math.pi * u[4:]
    return a * torch.cos(b * x + c) + d * torch.sin(e * x + g)
