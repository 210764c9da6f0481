import math

import pytest
import torch
from support.shares import N_DRAWN, seeded, within_four_sigma
from torch.testing import assert_close

import apd_lens as apd
from apd_lens import toys


def test_tms_data_is_sparse_and_uniform():
    x = toys.tms_data(N_DRAWN, seeded(), n_features=5)
    active = x > 0
    assert within_four_sigma(active.float().mean().item(), 0.05, x.numel())
    assert x[active].mean().item() == pytest.approx(0.5, abs=0.02)
    assert x.max() < 1
    # Independent: both of a pair are active as often as chance has it.
    assert within_four_sigma((active[:, 0] & active[:, 1]).float().mean().item(), 0.05**2, N_DRAWN)


def test_co_occurring_features_are_active_in_pairs_with_values_of_their_own():
    x = toys.tms_data(N_DRAWN, seeded(), n_features=6, co_occurring=True)
    active = x > 0
    assert torch.equal(active[:, 0::2], active[:, 1::2])
    assert within_four_sigma(active[:, 0].float().mean().item(), 0.05, N_DRAWN)
    assert within_four_sigma((active[:, 0] & active[:, 2]).float().mean().item(), 0.05**2, N_DRAWN)
    both = x[active[:, 0], :2]
    assert abs(torch.corrcoef(both.T)[0, 1]) < 4 / math.sqrt(len(both))


@pytest.fixture(scope="module")
def tms() -> toys.TMSTarget:
    return toys.train_tms(steps=600, lr=2e-2)


@pytest.fixture(scope="module")
def tms_with_identity() -> toys.TMSTarget:
    return toys.train_tms(4, 2, identity_layer=True, co_occurring=True, steps=5)


def test_a_step_has_the_same_batch_every_time(tms: toys.TMSTarget):
    batches = tms.batches(7)
    assert batches(3).shape == (7, 5)
    assert torch.equal(batches(3), tms.batches(7)(3))
    assert not torch.equal(tms.batches(64)(3), tms.batches(64)(4))
    assert not torch.equal(tms.batches(64)(3), tms.batches(64, seed=1)(3))


def test_tms_has_one_matrix_with_two_uses(tms: toys.TMSTarget):
    matrix = apd.wrap(tms.model).weights["linear1.weight"]
    assert [(use.site, use.transposed) for use in matrix.uses] == [("linear1", False), ("linear2", True)]
    assert_close(matrix.value(), tms.rows, rtol=0, atol=0)
    assert torch.equal(tms.model.linear2.weight, tms.model.linear1.weight.mT)


def test_tms_is_what_its_formula_says(tms: toys.TMSTarget, tms_with_identity: toys.TMSTarget):
    for target in (tms, tms_with_identity):
        x, W, b = target.batches(32)(0), target.rows, target.model.linear2.bias
        assert_close(target.model(x), torch.relu(x @ W @ W.mT + b))


def test_tms_stays_tied_when_it_is_moved():
    model = toys.TMS(3, 2).to(torch.float64)
    assert len(apd.wrap(model).weights) == 1
    assert model.linear2.weight.requires_grad


def test_training_a_tms_makes_it_better_than_giving_zero_or_the_mean(tms: toys.TMSTarget):
    """Var x = p/3 − p²/4 = 0.01604 is the error of the best constant."""
    assert tms.loss < 0.5 * (0.05 / 3 - 0.05**2 / 4)
    assert not any(parameter.requires_grad for parameter in tms.model.parameters())


def test_the_same_seed_gives_the_same_target_and_leaves_torchs_own_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (toys.train_tms(steps=3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first.rows, again.rows)
    assert not torch.equal(first.rows, other.rows)


def test_the_mechanisms_of_a_tms_are_its_rows(tms: toys.TMSTarget):
    mechanisms = tms.mechanisms["linear1.weight"]
    assert_close(mechanisms.sum(0), tms.rows)
    for feature in range(5):
        assert_close(mechanisms[feature, feature], tms.rows[feature])
        assert mechanisms[feature].count_nonzero() == 2


def test_features_that_co_occur_are_one_mechanism_and_the_identity_layer_is_one(tms_with_identity: toys.TMSTarget):
    target = tms_with_identity
    assert target.weights == ["linear1.weight", "hidden.weight"] == list(apd.wrap(target.model).weights)
    rows, hidden = (target.mechanisms[name] for name in target.weights)
    assert_close(rows[0], torch.cat([target.rows[:2], torch.zeros(2, 2)]))
    assert_close(rows[1], torch.cat([torch.zeros(2, 2), target.rows[2:]]))
    assert not rows[2].any()
    assert torch.equal(hidden, torch.cat([torch.zeros(2, 2, 2), torch.eye(2)[None]]))
    assert torch.equal(target.model.hidden.weight, torch.eye(2))  # training left it alone


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: toys.train_tms(5, 2, co_occurring=True), "n_features must be even, got 5"),
    ],
)
def test_sizes_that_cannot_be_are_refused(make, message: str):
    with pytest.raises(apd.errors.InvalidSetting, match=message):
        make()
