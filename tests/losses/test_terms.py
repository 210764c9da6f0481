"""Loss terms: what they are divided by, and what is done where a distance is very large."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import apd_lens as apd
from apd_lens.losses._terms import damped, scales_of


def test_relative_terms_are_means_over_matrices_of_what_each_lacks():
    """Weighted with their numbers of entries, 12 and 15; how large these are does not count. None is divided by 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 5, bias=False))
    model[0].weight.data *= 1000
    state = apd.init(model, n_components=4, rank=2, selection=apd.TopK(1))
    _, info = apd.step(state, torch.randn(6, 4))
    state = apd.init(model, n_components=4, rank=2, selection=apd.TopK(1))  # as before the step
    shares = [residual**2 for name, residual in state.decomposition().residuals().items() if name != "all"]
    assert_close(info.terms["faithfulness"].item(), (12 * shares[0] + 15 * shares[1]) / 27, rtol=1e-4, atol=0)
    scales = scales_of(apd.Losses(), {"zero": torch.zeros(2, 2), "one": torch.eye(2)})
    assert scales.faithfulness == {"zero": 2.0, "one": 4.0}
    assert scales.simplicity == {"zero": 2.0, "one": 4.0}


@pytest.mark.parametrize(("distance", "by"), [(0.5, 1.0), (1.0, 1.0), (40.0, 40.0)])
def test_the_gradient_of_a_large_distance_is_that_of_its_logarithm(distance: float, by: float):
    x = torch.tensor(distance, requires_grad=True)
    term = damped(3 * x, x, apd.Losses())
    term.backward()
    assert term.item() == 3 * distance
    assert x.grad.item() == pytest.approx(3 / by)


@pytest.mark.parametrize("losses", [apd.Losses(distance="kl"), apd.Losses(normalization="paper")])
def test_a_distance_that_is_no_share_is_as_it_is(losses: apd.Losses):
    x = torch.tensor(40.0, requires_grad=True)
    damped(x, x, losses).backward()
    assert x.grad == 1
