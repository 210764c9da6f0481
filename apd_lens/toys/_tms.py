"""Toy models of superposition."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import repeat
from jaxtyping import Float
from torch import Tensor, nn

from apd_lens.toys._shared import Data, batch_of_step, fresh_data, group_size, train_with_adamw


class TMS(nn.Module):
    """Toy model of superposition: relu(x W Wᵀ + b), or relu(x W I Wᵀ + b) with an identity layer.

    W, `n_features d_hidden`, is tied: the weights of `linear1` and `linear2` share memory, one as the transpose of the
    other. `to` keeps the tie; a deepcopy has two separate matrices.
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
        co_occurring: features 0 and 1, 2 and 3, ... are always active together, each with its own value.

    Raises:
        InvalidSetting: an odd number of features cannot be paired.
    """
    group = group_size(n_features, co_occurring)
    active = torch.rand(batch_size, n_features // group, generator=generator) < probability
    return repeat(active, "batch groups -> batch (groups group)", group=group) * torch.rand(
        batch_size, n_features, generator=generator
    )


@dataclass(frozen=True, eq=False)
class TMSTarget:
    """A trained toy model of superposition.

    Attributes:
        model: frozen.
        weights: the matrices to decompose.
        data: number of data points, generator -> data points.
        loss: mean squared error on fresh data.
        rows: W; row i belongs to feature i.
        mechanisms: name -> `n_mechanisms d_in d_out`, which sum to the matrix. A mechanism is the row of one feature,
            or the two rows of a pair of features. The identity layer, if there is one, comes last, since all features
            use it.
    """

    model: TMS
    weights: list[str]
    data: Data
    loss: float
    rows: Float[Tensor, "n_features d_hidden"]
    mechanisms: dict[str, Tensor]

    def batches(self, batch_size: int = 2048, seed: int = 0) -> Callable[[int], Tensor]:
        """A function step -> batch."""
        return partial(batch_of_step, self.data, batch_size, seed)


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
    """Trains a TMS to reproduce its input, with AdamW at a constant learning rate, as in the paper.

    Args:
        identity_layer: put a fixed identity between W and Wᵀ, which is decomposed too.
        co_occurring: features come in pairs that are always active together.
        probability: probability that a feature, or a pair of features, is active.

    Raises:
        InvalidSetting: an odd number of features cannot be paired.
    """
    group = group_size(n_features, co_occurring)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TMS(n_features, d_hidden, identity_layer)
    data = partial(tms_data, n_features=n_features, probability=probability, co_occurring=co_occurring)
    # One parameter stands for both weights, and the identity layer is left out.
    W, b = model.W.detach().clone().requires_grad_(), model.linear2.bias
    train_with_adamw([W, b], partial(_tms_loss, W, b, partial(batch_of_step, data, batch_size, seed)), steps, lr)
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
    x = fresh_data(data, seed)
    return TMSTarget(model, list(mechanisms), data, F.mse_loss(model(x), x).item(), rows, mechanisms)


def _tms_loss(W: Tensor, b: Tensor, batches: Callable[[int], Tensor], step: int) -> Tensor:
    x = batches(step)
    return F.mse_loss(torch.relu(x @ W @ W.mT + b), x)
