"""A mixture of components and of the rest is the model with substituted weights, r W + Σ_c (s_c − r) P_c."""

import pytest
import torch
from support.toy_models import decomposition_of, substituted
from torch import nn
from torch.testing import assert_close

from apd_lens.passes._replace import Mixture, all_but_one


class Lookup(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.read = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.read(torch.tanh(self.table(rows)))


def vectors_in_two_layers() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4)


HOSTS = {"vectors": vectors_in_two_layers, "lookups": lambda: (Lookup(), torch.randint(7, (6, 2)))}


@pytest.mark.parametrize("biases", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("fractional", [False, True], ids=["bool", "float"])
@pytest.mark.parametrize("r", [0.0, 0.4, 1.0, "of each example"])
@pytest.mark.parametrize("host", HOSTS)
def test_substituted_weights(host: str, r: float | str, fractional: bool, biases: bool):
    model, batch = HOSTS[host]()
    model.double()
    batch = batch.double() if batch.is_floating_point() else batch
    target = decomposition_of(model).target.with_biases(biases)
    components = decomposition_of(target).components
    s = torch.rand(6, 5, dtype=torch.float64) if fractional else torch.rand(6, 5) < 0.5
    rest = torch.rand(6, dtype=torch.float64) if isinstance(r, str) else r
    with target.intercepted(components.names, Mixture(components, s, rest)):
        came = model(batch)
    for example in range(6):
        r = rest[example] if isinstance(rest, torch.Tensor) else rest
        weights = {}
        for name in components.names:
            summed = torch.einsum("c,cio->io", s[example].double() - r, components.component_weights(name).double())
            weights[name] = r * target.weights[name].value() + summed
        expected = with_weights(target, weights, batch[example : example + 1])
        assert_close(came[example : example + 1], expected)


def with_weights(target, weights: dict[str, torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
    state = {name: value.clone() for name, value in target.model.state_dict().items()}
    for name, value in weights.items():
        target.model.load_state_dict(target.weights[name].state(value), strict=False)
    y = target.model(batch).detach()
    target.model.load_state_dict(state)
    return y


def test_the_rest_alone_is_bit_for_bit_the_host():
    model, x = vectors_in_two_layers()
    decomposition = decomposition_of(model)
    with decomposition.target.intercepted(["0.weight"], Mixture(decomposition.components.picked([]), 0.0, 1.0)):
        assert torch.equal(model(x), nn.Sequential(*model)(x))


def test_one_number_for_all_data_points():
    model, x = vectors_in_two_layers()
    decomposition = decomposition_of(model, "0.weight")
    P = decomposition.components.component_weights("0.weight").sum(0)
    with decomposition.target.intercepted(["0.weight"], Mixture(decomposition.components, 0.25)):
        came = model(x)
    with substituted(decomposition.target, {"0.weight": 0.25 * P}):
        assert_close(came, model(x))


@pytest.mark.parametrize("components_are", ["on in part", "all on"])
def test_a_rest_of_each_position(components_are: str):
    model, rows = HOSTS["lookups"]()
    decomposition = decomposition_of(model)
    on = torch.rand(6, 2, 5) if components_are == "on in part" else 1.0
    rest = torch.rand(6, 2).requires_grad_()
    came = run_on(decomposition, Mixture(decomposition.components, on, rest), rows)
    for place in range(2):  # positions do not mix
        at_place = on[:, place] if isinstance(on, torch.Tensor) else on
        expected = run_on(decomposition, Mixture(decomposition.components, at_place, rest[:, place]), rows)
        assert_close(came[:, place], expected[:, place])
    assert torch.autograd.grad(came.sum(), rest)[0].all()


def run_on(decomposition, mixture: Mixture, batch: torch.Tensor) -> torch.Tensor:
    with decomposition.target.intercepted(decomposition.components.names, mixture):
        return decomposition.target.model(batch)


def test_all_but_one():
    off = ~all_but_one(2, 3, torch.device("cpu"))
    assert off.long().argmax(1).tolist() == [0, 0, 0, 1, 1, 1]
    assert off.sum(1).tolist() == [1] * 6
    off = ~all_but_one(2, 1, torch.device("cpu"), positions=[3], places=slice(1, 3))  # component, then place
    assert [tuple(row.nonzero()[0].tolist()) for row in off] == [(1, 0), (2, 0), (1, 1), (2, 1)]
