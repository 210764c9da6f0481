import pytest
import torch
from torch import Tensor

import apd_lens as apd


def test_batch_topk_takes_the_largest_of_the_batch():
    attributions = torch.tensor([[9.0, 8.0, 7.0], [1.0, 2.0, 3.0]])
    assert torch.equal(apd.BatchTopK(1.5)(attributions), torch.tensor([[True, True, True], [False, False, False]]))
    assert torch.equal(apd.BatchTopK(1.0)(attributions), torch.tensor([[True, True, False], [False, False, False]]))


def test_topk_takes_the_largest_of_each_data_point():
    attributions = torch.tensor([[9.0, 8.0, 7.0], [1.0, 2.0, 3.0]])
    assert torch.equal(apd.TopK(1)(attributions), torch.tensor([[True, False, False], [False, False, True]]))
    assert torch.equal(apd.TopK(2)(attributions), torch.tensor([[True, True, False], [False, True, True]]))


@pytest.mark.parametrize("selection", [apd.BatchTopK(1.25), apd.TopK(2)])
def test_the_count_is_exact_even_with_ties(selection):
    mask = selection(torch.zeros(4, 3, 5))
    assert mask.shape == (4, 3, 5)
    assert mask.sum() == int(selection.k * 12)


@pytest.mark.parametrize("selection", [apd.BatchTopK(1.0), apd.TopK(2)])
def test_reordering_components_reorders_the_mask(selection):
    attributions, order = torch.rand(6, 5), torch.randperm(5)
    assert torch.equal(selection(attributions[:, order]), selection(attributions)[:, order])


@pytest.mark.parametrize(
    ("select", "message"),
    [
        (lambda a: apd.batch_topk_mask(a, 0.0), "selects int(k·n) = 0 of the n·C = 4 · 3 = 12"),
        (lambda a: apd.batch_topk_mask(a, 0.2), "Choose k between 0.25 and 3"),
        (lambda a: apd.batch_topk_mask(a, 3.5), "selects int(k·n) = 14 of the n·C = 4 · 3 = 12"),
        (lambda a: apd.topk_mask(a, 0), "TopK(k=0) needs k between 1 and the number of components, 3"),
        (lambda a: apd.topk_mask(a, 4), "TopK(k=4) needs k between 1"),
    ],
)
def test_a_k_that_cannot_be_is_refused(select, message: str):
    with pytest.raises(apd.InvalidSetting) as error:
        select(torch.rand(4, 3))
    assert message in str(error.value)


def test_masks_need_no_gradient():
    attributions: Tensor = torch.rand(2, 3, requires_grad=True)
    assert not apd.TopK(1)(attributions).requires_grad
