"""The paper's systems: small models whose mechanisms are known, their data, and how they are trained or coded.

Source: Braun et al. 2025, arXiv 2501.14926. Batches are drawn on the CPU from a seeded generator, models are made
there, and the same seed gives the same model and the same batches.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import repeat
from jaxtyping import Float
from torch import Tensor, nn

from apd_lens._errors import InvalidSetting
from apd_lens.metrics import neuron_contributions

# Number of data points and a generator on the CPU -> that many data points.
Data = Callable[[int, torch.Generator], Tensor]

# The inputs of gated functions lie between 0 and this.
X_MAX = 5.0


class TMS(nn.Module):
    """Toy model of superposition: relu(x W Wᵀ + b), or relu(x W I Wᵀ + b) with an identity layer.

    W, `n_features d_hidden`, is truly tied: the weights of `linear1` and `linear2` are one place in memory, one the
    transpose of the other. They stay so in `to`; a deepcopy has two matrices.
    """

    def __init__(self, n_features: int, d_hidden: int, identity_layer: bool = False):
        super().__init__()
        self.linear1 = nn.Linear(n_features, d_hidden, bias=False)
        self.hidden = nn.Linear(d_hidden, d_hidden, bias=False) if identity_layer else nn.Identity()
        self.linear2 = nn.Linear(d_hidden, n_features)
        nn.init.xavier_normal_(self.linear1.weight)
        nn.init.zeros_(self.linear2.bias)
        if isinstance(self.hidden, nn.Linear):
            nn.init.eye_(self.hidden.weight)
        self._tie()

    @property
    def W(self) -> Float[Tensor, "n_features d_hidden"]:
        return self.linear1.weight.mT

    def forward(self, x: Float[Tensor, "batch n_features"]) -> Float[Tensor, "batch n_features"]:
        return torch.relu(self.linear2(self.hidden(self.linear1(x))))

    def _tie(self) -> None:
        first = self.linear1.weight
        self.linear2.weight = nn.Parameter(first.detach().mT, requires_grad=first.requires_grad)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TMS":
        super()._apply(fn, recurse)
        self._tie()
        return self


class MLP(nn.Module):
    """mlp_out(relu(mlp_in(r))); `act` is the place of the post-ReLU activations."""

    def __init__(self, d_resid: int, n_neurons: int, bias: bool):
        super().__init__()
        self.mlp_in = nn.Linear(d_resid, n_neurons, bias=bias)
        self.act = nn.ReLU()
        self.mlp_out = nn.Linear(n_neurons, d_resid, bias=False)

    def forward(self, r: Float[Tensor, "batch d_resid"]) -> Float[Tensor, "batch d_resid"]:
        return self.mlp_out(self.act(self.mlp_in(r)))


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
        """W_in `d_resid n_neurons` and W_out `n_neurons d_resid` of every layer, as views of the parameters."""
        mlps = [layer for layer in self.layers if isinstance(layer, MLP)]
        return [(mlp.mlp_in.weight.mT, mlp.mlp_out.weight.mT) for mlp in mlps]

    def forward(self, x: Float[Tensor, "batch n_features"]) -> Float[Tensor, "batch n_features"]:
        r = self.W_E(x)
        for layer in self.layers:
            r = r + layer(r)
        return self.W_U(r)

    def folded(self, x: Float[Tensor, "batch n_features"]) -> Float[Tensor, "batch n_features"]:
        """The same output by products of matrices first: no tensor of size batch × d_resid, which makes it fast where
        d_resid is much larger than the number of features and neurons."""
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


def tms_data(
    batch_size: int,
    generator: torch.Generator,
    *,
    n_features: int = 5,
    probability: float = 0.05,
    co_occurring: bool = False,
) -> Float[Tensor, "batch n_features"]:
    """x_i ~ U[0, 1] with the given probability, else 0.

    Args:
        co_occurring: features 0 and 1, 2 and 3, ... are always active together, each with a value of its own.

    Raises:
        InvalidSetting: an odd number of features cannot be paired.
    """
    group = _group_size(n_features, co_occurring)
    active = torch.rand(batch_size, n_features // group, generator=generator) < probability
    return repeat(active, "batch groups -> batch (groups group)", group=group) * torch.rand(
        batch_size, n_features, generator=generator
    )


def residual_mlp_data(
    batch_size: int, generator: torch.Generator, *, n_features: int = 100, probability: float = 0.01
) -> Float[Tensor, "batch n_features"]:
    """x_i ~ U[-1, 1] with the given probability, else 0."""
    # One draw for both, which takes half the time: below `probability` it is uniform again.
    u = torch.rand(batch_size, n_features, generator=generator)
    return torch.where(u < probability, u * (2 / probability) - 1, 0.0)


def gated_data(
    batch_size: int, generator: torch.Generator, *, n_functions: int = 4, probability: float = 0.05
) -> Float[Tensor, "batch inputs"]:
    """x ~ U[0, 5], then the control bits, each 1 with the given probability, else 0."""
    x = X_MAX * torch.rand(batch_size, 1, generator=generator)
    bits = torch.rand(batch_size, n_functions, generator=generator) < probability
    return torch.cat([x, bits.to(x.dtype)], 1)


def residual_mlp_labels(x: Float[Tensor, "batch n_features"]) -> Float[Tensor, "batch n_features"]:
    """What the residual MLP is trained to give: x + relu(x)."""
    return x + torch.relu(x)


def piecewise_linear(
    x: Float[Tensor, " batch"], values: Float[Tensor, "n_functions knots"]
) -> Float[Tensor, "batch n_functions"]:
    """The functions that go straight through the given values at knots spread evenly from 0 to 5.

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
class TMSTarget:
    """A trained toy model of superposition.

    Attributes:
        model: frozen.
        weights: the matrices to decompose.
        data: number of data points, generator -> data points.
        loss: mean squared error on fresh data.
        rows: W, whose row i is what the model has of feature i.
        mechanisms: name -> `n_mechanisms d_in d_out`, which sum to the matrix: for each feature its row alone, or its
            two rows where features come in pairs; last, where there is one, the identity layer, which all features use.
    """

    model: TMS
    weights: list[str]
    data: Data
    loss: float
    rows: Float[Tensor, "n_features d_hidden"]
    mechanisms: dict[str, Tensor]

    def batches(self, batch_size: int = 2048, seed: int = 0) -> Callable[[int], Tensor]:
        """A function step -> batch."""
        return partial(_batch, self.data, batch_size, seed)


@dataclass(frozen=True, eq=False)
class ResidualMLPTarget:
    """A trained residual MLP.

    Attributes:
        model: frozen.
        weights: the matrices to decompose, those of the MLPs.
        data: number of data points, generator -> data points.
        loss: mean squared error on fresh data.
        contributions: how much each neuron, those of all layers side by side, does for each feature; see
            `apd_lens.metrics.neuron_contributions`. What a later layer reads of an earlier one is not in it.
    """

    model: ResidualMLP
    weights: list[str]
    data: Data
    loss: float
    contributions: Float[Tensor, "n_features neurons"]

    def batches(self, batch_size: int = 2048, seed: int = 0) -> Callable[[int], Tensor]:
        """A function step -> batch."""
        return partial(_batch, self.data, batch_size, seed)


@dataclass(frozen=True, eq=False)
class GatedTarget:
    """Hand-coded gated functions.

    Attributes:
        model: frozen.
        weights: the matrices to decompose. Biases are not among them.
        data: number of data points, generator -> data points.
        loss: mean squared error against `gated_labels` on fresh data, which is rounding.
        values: of the coded functions at their knots.
        owned: name -> `n_functions d_in d_out`, which weights belong to which function; a weight that is zero belongs
            to none.
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
        return partial(_batch, self.data, batch_size, seed)


def train_tms(
    n_features: int = 5,
    d_hidden: int = 2,
    *,
    identity_layer: bool = False,
    co_occurring: bool = False,
    probability: float = 0.05,
    steps: int = 5000,
    batch_size: int = 1024,
    lr: float = 5e-3,
    seed: int = 0,
) -> TMSTarget:
    """Trains a TMS to give back its input, by AdamW with a constant learning rate as in the paper.

    Args:
        identity_layer: a fixed identity between W and Wᵀ, decomposed too.
        co_occurring: features come in pairs that are always active together.
        probability: of each feature, or pair of features, to be active.

    Raises:
        InvalidSetting: an odd number of features cannot be paired.
    """
    group = _group_size(n_features, co_occurring)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TMS(n_features, d_hidden, identity_layer)
    data = partial(tms_data, n_features=n_features, probability=probability, co_occurring=co_occurring)
    # One parameter stands for both weights, and the identity layer is left out.
    W, b = model.W.detach().clone().requires_grad_(), model.linear2.bias
    _train([W, b], partial(_tms_loss, W, b, partial(_batch, data, batch_size, seed)), steps, lr)
    with torch.no_grad():
        model.W.copy_(W)
    model.requires_grad_(False)

    rows = model.W.clone()
    members = torch.eye(n_features // group).repeat_interleave(group, 1)
    mechanisms = {"linear1.weight": members[:, :, None] * rows}
    if identity_layer:
        eye = torch.eye(d_hidden)
        mechanisms = {
            "linear1.weight": torch.cat([mechanisms["linear1.weight"], torch.zeros(1, n_features, d_hidden)]),
            "hidden.weight": torch.cat([torch.zeros(len(members), d_hidden, d_hidden), eye[None]]),
        }
    x = _fresh(data, seed)
    return TMSTarget(model, list(mechanisms), data, F.mse_loss(model(x), x).item(), rows, mechanisms)


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
    """Trains a residual MLP to give x + relu(x), by AdamW with lr·cos(π/2 · progress) as in the paper.

    Args:
        n_neurons: of all layers together.

    Raises:
        InvalidSetting: the layers cannot have the same number of neurons.
    """
    _check_divides(n_neurons, n_layers, "n_neurons")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ResidualMLP(n_features, d_resid, n_neurons // n_layers, n_layers)
    data = partial(residual_mlp_data, n_features=n_features, probability=probability)
    model.W_E.requires_grad_(False)
    model.W_U.requires_grad_(False)
    loss_at = partial(_residual_mlp_loss, model, partial(_batch, data, batch_size, seed))
    _train(model.layers.parameters(), loss_at, steps, lr, decay=True)
    model.requires_grad_(False)

    W_E, W_U = model.W_E.weight.mT, model.W_U.weight.mT
    contributions = torch.cat([neuron_contributions(W_E, *layer, W_U) for layer in model.matrices()], 1)
    weights = [f"layers.{layer}.{side}.weight" for layer in range(n_layers) for side in ("mlp_in", "mlp_out")]
    x = _fresh(data, seed)
    loss = F.mse_loss(model(x), residual_mlp_labels(x)).item()
    return ResidualMLPTarget(model, weights, data, loss, contributions)


def make_gated_functions(
    n_functions: int = 4,
    *,
    neurons_per_function: int = 10,
    n_layers: int = 2,
    probability: float = 0.05,
    seed: int = 0,
) -> GatedTarget:
    """Codes gated functions by hand, each a piecewise-linear fit of a random cosine and sine.

    f(x) = a cos(b x + c) + d sin(e x + g) with a, d ~ U[-1, 1], b, e ~ U[0.5, 2] and c, g ~ U[0, 2π], fitted at knots
    t_j spread evenly from 0 to 5. A function has one neuron relu(bit), which writes f(0), and for every piece a neuron
    relu(x − t_j + 5 (bit − 1)), which writes the change of slope at t_j and is off for every x where the bit is 0. Its
    neurons are shared out at random among the layers, the same number to each.

    Raises:
        InvalidSetting: fewer than two neurons a function, or a number that cannot be shared out evenly.
    """
    _check_divides(neurons_per_function, n_layers, "neurons_per_function")
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
    x = _fresh(data, seed)
    loss = F.mse_loss(model(x), gated_labels(x, values)).item()
    return GatedTarget(model, list(owned), data, loss, values, owned, mechanisms)


def _batch(data: Data, batch_size: int, seed: int, step: int) -> Tensor:
    # Of a seed the CPU's generator takes 32 bits; a prime keeps the steps of small seeds apart.
    return data(batch_size, torch.Generator().manual_seed(seed * 1_000_003 + step))


def _fresh(data: Data, seed: int) -> Tensor:
    """Data points that no step has seen."""
    return _batch(data, 2**14, seed, -1)


def _train(
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


def _tms_loss(W: Tensor, b: Tensor, batches: Callable[[int], Tensor], step: int) -> Tensor:
    x = batches(step)
    return F.mse_loss(torch.relu(x @ W @ W.mT + b), x)


def _residual_mlp_loss(model: ResidualMLP, batches: Callable[[int], Tensor], step: int) -> Tensor:
    x = batches(step)
    return F.mse_loss(model.folded(x), residual_mlp_labels(x))


def _random_waves(
    n_functions: int, x: Float[Tensor, " knots"], generator: torch.Generator
) -> Float[Tensor, "n_functions knots"]:
    """a cos(b x + c) + d sin(e x + g), at the given x."""
    u = torch.rand(6, n_functions, 1, generator=generator)
    a, d = 2 * u[:2] - 1
    b, e = 0.5 + 1.5 * u[2:4]
    c, g = 2 * math.pi * u[4:]
    return a * torch.cos(b * x + c) + d * torch.sin(e * x + g)


def _group_size(n_features: int, co_occurring: bool) -> int:
    if co_occurring and n_features % 2:
        raise InvalidSetting(f"co_occurring=True pairs features, so n_features must be even, got {n_features}.")
    return 2 if co_occurring else 1


def _check_divides(number: int, n_layers: int, name: str) -> None:
    if n_layers < 1 or number < n_layers or number % n_layers:
        raise InvalidSetting(
            f"{name} must be a multiple of n_layers, so that every layer has the same number; got {name}={number} and "
            f"n_layers={n_layers}."
        )
