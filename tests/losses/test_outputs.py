import math

import pytest
import torch
from torch.testing import assert_close

import apd_lens as apd
from apd_lens.losses import _outputs
from apd_lens.losses._outputs import distance_of_each, hidden_activation_loss, kl_divergence, minimality_loss

TARGET, OTHER = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[3.0, 1.0], [1.0, 3.0]])


def test_squared_errors_by_hand():
    assert_close(distance_of_each(TARGET, OTHER, "mse"), torch.tensor([5.0, 2.0]))
    assert minimality_loss(TARGET, OTHER) == 3.5
    assert minimality_loss(TARGET, OTHER, valid=None) == distance_of_each(TARGET, OTHER, "mse").mean()
    assert hidden_activation_loss(TARGET, OTHER) == 7.0


def test_padding_is_not_counted():
    valid = torch.tensor([[True, False]])
    assert minimality_loss(TARGET[None], OTHER[None], "mse", valid) == 5.0


def test_kl_of_known_distributions():
    """(1/2, 1/2) and (3/4, 1/4): KL = log 2 − log 3 / 2."""
    target, other = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()
    assert_close(kl_divergence(target, other), torch.tensor([math.log(2) - math.log(3) / 2]))
    assert_close(kl_divergence(other, other + 7), torch.zeros(1))  # logits are known up to a constant
    assert_close(minimality_loss(target, other, "kl"), kl_divergence(target, other).mean())


def test_a_distance_of_the_users():
    assert minimality_loss(TARGET, OTHER, lambda a, b: (a - b).abs().sum(-1)) == 3.0
    with pytest.raises(apd.ShapeMismatch, match="one scalar a data point"):
        minimality_loss(TARGET, OTHER, lambda a, b: (a - b).abs())


def test_the_gradient_of_kl_is_autograds_in_any_number_of_pieces(monkeypatch):
    target = torch.randn(3, 4, 7, dtype=torch.float64)
    logits, weights = torch.randn_like(target).requires_grad_(), torch.rand(3, 4, dtype=torch.float64)
    log_p, log_q = target.log_softmax(-1), logits.log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    (expected_gradient,) = torch.autograd.grad(expected, logits, weights)
    for budget in (1, 2**29):
        monkeypatch.setattr(_outputs, "BUDGET", budget)
        found = kl_divergence(target, logits)
        assert torch.equal(found, expected)
        torch.testing.assert_close(
            torch.autograd.grad(found, logits, weights)[0], expected_gradient, rtol=0, atol=1e-12
        )
    assert kl_divergence(target[:0], logits[:0]).shape == (0, 4)
