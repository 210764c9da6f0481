import pytest
import torch

import apd_lens as apd
from apd_lens.masks._error import attribution_error


def test_estimates_that_agree_have_no_error():
    samples = torch.tensor([[3.0, 1.0], [1.0, 2.0]]).expand(4, 2, 2)
    error = attribution_error(samples, apd.TopK(1))
    assert (error.relative, error.agreement) == (0, 1)


def test_a_known_spread():
    """Squares 1 and 3: mean 2, standard deviation √2, so the standard error of √2 is √2 / √2 / (2 √2)."""
    samples = torch.tensor([[[1.0, 0.0]], [[3**0.5, 0.0]]])
    assert attribution_error(samples, apd.TopK(1)).relative == pytest.approx(1 / 4, abs=1e-6)


def test_halves_that_select_others_do_not_agree():
    samples = torch.tensor([[[2.0, 0.0]], [[0.0, 1.0]]])
    assert attribution_error(samples, apd.TopK(1)).agreement == 0
