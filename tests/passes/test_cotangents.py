import pytest
import torch
from torch.testing import assert_close

from apd_lens.passes._cotangents import one_hot_cotangents, random_cotangents

OUTPUT, EFFECT = torch.zeros(5, 2, 3), torch.arange(1.0, 7.0).view(2, 3)


def squares(cotangents) -> torch.Tensor:
    rows = cotangents.rows(0, cotangents.count)
    return (rows * EFFECT).flatten(1).sum(1).square().sum() / cotangents.scale


def test_one_for_each_output_gives_the_sum_of_squares():
    cotangents = one_hot_cotangents(OUTPUT)
    assert (cotangents.count, cotangents.scale, cotangents.exact) == (6, 1, True)
    assert_close(squares(cotangents), EFFECT.square().sum())
    assert torch.equal(cotangents.rows(2, 4), cotangents.rows(0, 6)[2:4])
    assert torch.equal(cotangents.some(2, 5).rows(1, 3), cotangents.rows(3, 5))


@pytest.mark.parametrize("kind", ["rademacher", "normal"])
def test_random_ones_give_it_on_average(kind):
    """The standard error of K = 20000 draws is about sqrt(2 / K) = 1 % of the sum."""
    cotangents = random_cotangents(OUTPUT, 20_000, kind, torch.Generator().manual_seed(0))
    assert not cotangents.exact
    assert_close(squares(cotangents), EFFECT.square().sum(), rtol=0.04, atol=0)
    again = random_cotangents(OUTPUT, 20_000, kind, torch.Generator().manual_seed(0))
    assert torch.equal(again.rows(5, 9), cotangents.rows(5, 9))
