import pytest
import torch
from torch.testing import assert_close

from apd_lens.components._pairs import active_pairs, pairwise_product


def test_pairs_stand_by_component_and_then_by_data_point():
    mask = torch.tensor([[True, False, True], [True, False, False]])
    pairs = active_pairs(mask)
    assert pairs.places.shape == (3,)
    assert torch.equal(active_pairs(mask, 3).places, pairs.places)


@pytest.mark.parametrize("way", ["padded", "grouped"])
def test_every_way_is_the_sum_over_active_components(way):
    x, A, B = torch.randn(6, 4), torch.randn(3, 4, 2), torch.randn(3, 2, 5)
    x.requires_grad_()
    mask = torch.rand(6, 3) < 0.5
    expected = torch.einsum("nc,ni,cim,cmo->no", mask.float(), x, A, B)
    came = pairwise_product(x, A, B, mask, active_pairs(mask), way)
    assert_close(came, expected, rtol=1e-4, atol=1e-5)
    upstream = torch.randn(6, 5)
    ours, theirs = (torch.autograd.grad(y, x, upstream, retain_graph=True)[0] for y in (came, expected))
    assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
