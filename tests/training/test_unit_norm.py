"""Columns of A at norm 1: the step against one written out, and that moves keep to it."""

from dataclasses import replace

import pytest
import torch
from support.toy_models import ResidualMLP, TinyGPT
from torch import Tensor, nn
from torch.testing import assert_close

import apd_lens as apd
from apd_lens.training._unit_norm import normalize_columns


def column_norms(components: apd.ParameterComponents) -> Tensor:
    return torch.cat([A.detach().norm(dim=1).flatten() for A in components.A.values()])


def copies(components: apd.ParameterComponents) -> dict[str, Tensor]:
    return {name: components.component_weights(name).detach().clone() for name in components.names}


def test_normalised_components_are_the_same():
    model = ResidualMLP(4, 6, 5, 1)
    plain, unit = (
        apd.init(model, n_components=5, rank=2, optimization=apd.Optimization(unit_norm=unit_norm))
        for unit_norm in (False, True)
    )
    norms = column_norms(unit.components)
    assert_close(norms, torch.ones_like(norms))
    assert (column_norms(plain.components) - 1).abs().max() > 0.1
    wanted = copies(plain.components)
    for name, parts in copies(unit.components).items():
        assert_close(parts, wanted[name])


def test_steps_are_those_written_out():
    """Three steps of Adam on g − a <a, g>, then a / ‖a‖, for each column a; B is left to Adam alone."""
    model, x = nn.Linear(4, 3, bias=False).double(), torch.randn(7, 4, dtype=torch.float64)
    optimization = apd.Optimization(steps=3, lr=0.1, schedule="constant", warmup=0.0, unit_norm=True, scaled=False)
    losses = replace(apd.paper()["losses"], faithfulness=1.0, minimality=0.0, simplicity=0.3)
    options = {"n_components": 3, "rank": 2, "selection": apd.TopK(3), "losses": losses}
    state = apd.init(model, optimization=optimization, **options)
    W = model.weight.detach().T
    A, B = (factors["weight"].detach().clone().requires_grad_() for factors in (state.components.A, state.components.B))
    adam = torch.optim.Adam([A, B], lr=0.1)
    for _ in range(3):
        state, _ = apd.step(state, x)
        schatten = (A.square().sum(1) * B.square().sum(2) + 1e-16).sqrt().sum()
        loss = ((W - (A @ B).sum(0)).square().sum() + 0.3 * schatten) / 12
        adam.zero_grad()
        loss.backward()
        for c in range(3):
            for i in range(2):
                a, g = A.detach()[c, :, i], A.grad[c, :, i].clone()
                A.grad[c, :, i] = g - a * (a @ g)
        adam.step()
        with torch.no_grad():
            A /= A.norm(dim=1, keepdim=True)
    assert_close(state.components.A["weight"], A, rtol=1e-9, atol=1e-12)
    assert_close(state.components.B["weight"], B, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("moves", [apd.moves.SplitMoves(every=2), apd.moves.ClusterMoves(every=2)])
def test_norms_stay_one_in_training_with_moves(moves):
    model, x = TinyGPT(), torch.randint(11, (12, 4))
    norms, moved = [], 0
    optimization = apd.Optimization(steps=12, lr=1e-2, unit_norm=True)
    state = apd.init(
        model, weights=["wte*", "fc*", "proj*"], n_components=20, rank=2, selection=apd.TopK(1), moves=moves,
        optimization=optimization,
    )  # fmt: skip
    for _ in range(12):
        state, info = apd.step(state, x)
        moved += info.moves
        norms.append(column_norms(state.components))
    assert moved > 0
    assert_close(torch.stack(norms), torch.ones(12, len(norms[0])))


def test_columns_of_zeros_stay_and_cost_nothing():
    model, x = nn.Linear(4, 3), torch.randn(7, 4)
    optimization = apd.Optimization(lr=1e-2, unit_norm=True)
    state = apd.init(model, n_components=3, rank=2, selection=apd.TopK(2), optimization=optimization)
    with torch.no_grad():
        state.components.A["weight"][1] = 0.0
        state.components.B["weight"][1] = 0.0
    normalize_columns(state.components)
    for _ in range(3):
        state, info = apd.step(state, x)
        assert info.loss.isfinite()
    assert torch.equal(state.components.component_weights("weight")[1], torch.zeros(4, 3))
    norms = column_norms(state.components)
    assert_close(norms, torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 1.0]))
