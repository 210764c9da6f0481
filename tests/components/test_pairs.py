import pytest
import torch
from torch.testing import assert_close

from apd_lens.components._pairs import active_pairs, pairwise_product

MASK = torch.tensor([[True, False, True], [True, False, False]])


def test_pairs_stand_by_data_point_and_then_by_component():
    pairs = active_pairs(MASK)
    assert (pairs.data_points.tolist(), pairs.components.tolist()) == ([0, 0, 1], [0, 2, 0])
    assert pairs.by_component.tolist() == [0, 2, 1]
    twice = pairs.repeated(2)  # rows 0 and 1 are of the first data point
    assert (twice.data_points.tolist(), twice.components.tolist()) == ([0, 0, 1, 1, 2, 3], [0, 2, 0, 2, 0, 0])


def test_links_and_their_transpose():
    links = active_pairs(MASK).links(2)
    assert links.parts.tolist() == [0, 1, 4, 5, 0, 1]
    assert links.row_starts.tolist() == [0, 4, 6]
    assert links.rows.tolist() == [0, 1, 0, 1, 0, 0]
    assert links.part_starts.tolist() == [0, 2, 4, 4, 4, 5, 6]
    assert links.order.tolist() == [0, 4, 1, 5, 2, 3]


@pytest.mark.parametrize("way", ["grouped", "sparse"])
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
