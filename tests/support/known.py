"""Decompositions whose measures are known by hand."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from support.toy_models import decomposition_of, linear_of_known_parts
from torch import Tensor, nn

import apd_lens as apd
from apd_lens import compare
from apd_lens.decomposition._decomposition import Decomposition
from apd_lens.passes._output import default_output

ORDER = torch.tensor([3, 0, 5, 1, 4, 2])

X = torch.tensor(
    [
        [1.0, 0.0, 0.0, 0.0],
        [5.0, 0.0, 0.0, 0.0],
        [0.0, 3.0, 0.0, 0.0],
        [0.0, 2.0, 1.0, 0.0],
        [3.0, 0.0, 0.0, 0.0],
        [0.0, -4.0, 2.0, 0.0],
    ]
)


def only_head(decomposition: apd.Decomposition, component: int, layer: int, head: int, group: int = 1) -> None:
    """Takes out of a component all that is not in one head, or in the keys and values that its group shares."""
    for name in decomposition.components.names:
        stored = head // group if name.endswith(("W_K", "W_V")) else head
        heads = slice(4 * stored, 4 * stored + 4)
        A, B = decomposition.components.A[name].data, decomposition.components.B[name].data
        side = A[component] if name.endswith("W_O") else B[component].mT
        kept = side[heads].clone()
        side.zero_()
        if compare.layer_of(name) == layer:
            side[heads] = kept


def additive() -> apd.Decomposition:
    """y = x W, W of four parts of size 1, 2, 3, 4, each on an axis of its own: on x = 1 the sum of y is 10, and a
    component brings its size."""
    model, components = linear_of_known_parts()
    return replace(decomposition_of(model, n_components=4), components=components.requires_grad_(False))


class TwoLayers(nn.Module):
    """relu(x W_in) W_out, with W_in the identity and W_out a rotation: feature i goes through neuron i."""

    def __init__(self, n: int, d_out: int):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(n, n, bias=False), nn.ReLU(), nn.Linear(n, d_out, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(n))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x)))


def one_component_a_feature(n: int = 6, d_out: int = 8, granularity="example") -> apd.Decomposition:
    """Component i is row i of W_in and of W_out: the exact mechanism of feature i."""
    torch.manual_seed(0)
    model = TwoLayers(n, d_out).requires_grad_(False)
    state = apd.init(model, n_components=n, rank=1, selection=apd.TopK(1, granularity))
    e = torch.eye(n)
    rows = model.last.weight.mT.clone()
    components = apd.ParameterComponents(
        {"first.weight": e[:, :, None], "last.weight": e[:, :, None]},
        {"first.weight": e[:, None, :], "last.weight": rows[:, None, :]},
    )
    return apd.Decomposition(
        target=state.decomposition().target,
        components=components.requires_grad_(False),
        settings=state.decomposition().settings,
        output=state.decomposition().output,
        fingerprints={},
    )


def one_hot_batches(n: int = 6, n_batches: int = 4, size: int = 48) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    active = torch.randint(n, (n_batches, size), generator=generator)
    return list(F.one_hot(active, n) * (0.5 + torch.rand(n_batches, size, 1, generator=generator)))


def permuted_rows(decomposition: apd.Decomposition) -> compare.Dictionary:
    """A dictionary of the neurons' activations whose latent j is what component ORDER[j] writes, with what is read."""
    rows = decomposition.target.weights["last.weight"].value()[ORDER]
    return compare.Dictionary("act", torch.eye(6)[:, ORDER], rows, site_out="last")


def nan_from(step: int):
    """A distance that is NaN from a step on; called once a step."""
    count = -1

    def distance(target, sparse):
        nonlocal count
        count += 1
        return (target - sparse).square().mean(-1) * (float("nan") if count >= step else 1.0)

    return distance


def known_parts(k: float = 1.0) -> Decomposition:
    """y = x @ diag(1, 2, 3, 4), component c = the entry c."""
    model, components = linear_of_known_parts()
    settings = apd.decomposition.Settings(selection=apd.BatchTopK(k))
    return Decomposition(apd.wrap(model), components.requires_grad_(False), settings, default_output, {})
