"""The attack that goes on beside the training."""

from dataclasses import replace

import torch
from torch import nn
from torch.testing import assert_close

import apd_lens as apd
from apd_lens.training._attack import Attack

LOSSES = apd.Losses(attack=1.0)


def test_shares_of_a_batch_are_those_of_its_places():
    attack = Attack.drawn(6, 4, torch.zeros(()), seed=0)
    assert attack.shares.shape == (6, 4)
    assert torch.equal(attack.of(torch.Size([2, 3])), attack.shares.unflatten(0, (2, 3)))
    assert torch.equal(attack.of(torch.Size([8]))[6:], attack.shares[:2])


def test_it_goes_up_and_stays_in_bounds():
    attack = Attack.starting(torch.tensor([[0.5, 0.5], [0.995, 0.003]]))
    (attack.of(torch.Size([2])) * torch.tensor([1.0, -1.0])).sum().backward()
    attack.ascend()
    assert_close(attack.shares.detach(), torch.tensor([[0.51, 0.49], [1.0, 0.0]]))


def test_it_finds_more_harm_than_chance():
    """With components that do not learn, and sum to the model, the loss under the attack rises above that of random
    parts."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(16, 4)
    still = apd.Optimization(steps=60, lr=1e-12)
    still = replace(still, start="matrices")
    state, found = apd.init(model, n_components=5, rank=4, losses=LOSSES, optimization=still, moves=None), []
    for _ in range(60):
        state, info = apd.step(state, x)
        found.append((info.terms["attack"].item(), info.terms["path"].item()))
    assert found[-1][0] > 1.3 * found[0][0]
    assert found[-1][0] > 1.1 * sum(path for _, path in found) / len(found)


def test_a_state_is_restored_with_it():
    model, x = nn.Linear(4, 3), torch.randn(6, 4)
    options = {"n_components": 5, "rank": 2, "losses": LOSSES, "moves": None}
    state = apd.init(model, **options)
    for _ in range(2):
        state, _ = apd.step(state, x)
    restored = apd.init(model, **options).restored(state.tensors())
    state, info = apd.step(state, x)
    restored, again = apd.step(restored, x)
    assert torch.equal(restored.attack.shares, state.attack.shares)
    assert info.loss == again.loss
    assert replace(state, attack=None).tensors().keys() < state.tensors().keys()
