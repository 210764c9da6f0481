import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from apd_lens.start._fitted import dual_basis, groups_at_once, padded_rows, truncated


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def metric_of(d: int) -> Tensor:
    x = drawn(3 * d, d, seed=1) * torch.linspace(0.1, 2, d, dtype=torch.float64)
    return x.mT @ x / len(x)


def test_each_group_does_what_the_weights_do_for_its_rows_and_nothing_for_others():
    rows, W, groups = drawn(7, 12), drawn(12, 5, seed=2), torch.tensor([0, 1, 1, 2, 0, 3, 3])
    dual = dual_basis(rows, torch.linspace(0.2, 1, 7, dtype=torch.float64), metric_of(12), ridge=1e-9)
    for group in range(4):
        P = dual[groups == group].mT @ (rows[groups == group] @ W)
        assert_close(rows @ P, (groups == group)[:, None] * (rows @ W), atol=1e-5, rtol=0)


@pytest.mark.parametrize("n_rows", [4, 12, 40])
def test_both_ways_to_solve_are_the_formula(n_rows: int):
    rows, weights, G = drawn(n_rows, 12), drawn(n_rows, seed=3).abs() + 0.1, metric_of(12)
    weighted = weights[:, None] * rows
    ridge = 1e-3 * (weighted @ G.inverse() @ weighted.mT).diagonal().mean()
    expected = (ridge * G + weighted.mT @ weighted).inverse() @ weighted.mT * weights
    assert_close(dual_basis(rows, weights, G), expected.mT)


def test_of_all_bases_that_are_dual_it_does_least_to_other_inputs():
    rows, G, ones = drawn(4, 10), metric_of(10), torch.ones(4, dtype=torch.float64)
    in_metric, plain = dual_basis(rows, ones, G, 1e-10), dual_basis(rows, ones, torch.eye(10).double(), 1e-10)
    assert_close(plain @ rows.mT, in_metric @ rows.mT, atol=1e-6, rtol=0)
    assert ((in_metric @ G) * in_metric).sum() < 0.9 * ((plain @ G) * plain).sum()


@pytest.mark.parametrize(("n_rows", "m"), [(2, 4), (5, 3), (9, 6)])
def test_what_is_cut_is_the_best_of_its_rank_on_its_own_inputs(n_rows: int, m: int):
    x, W, weights = drawn(3, n_rows, 9), drawn(9, 8, seed=1), drawn(3, n_rows, seed=2).abs()
    A, B = truncated(torch.linalg.pinv(x), x @ W, weights, m)
    U, S, Vh = torch.linalg.svd(weights[..., None] * (x @ W), full_matrices=False)
    assert_close(weights[..., None] * (x @ A @ B), U[..., :m] * S[:, None, :m] @ Vh[:, :m])
    assert_close(A.norm(dim=1), B.norm(dim=2))
    assert A.shape[-1] <= m


def test_groups_of_like_size_come_together_and_every_row_once():
    groups = torch.tensor([5, 0, 5, 2, 5, 0, 0, 0, 0, 7])
    rows = torch.arange(10.0)[:, None]
    found = groups_at_once(groups, d=1)
    assert [numbers.tolist() for numbers, _ in found] == [[2, 7], [5], [0]]
    for numbers, picked in found:
        for number, some, values in zip(numbers, picked, padded_rows(rows, picked), strict=True):
            assert some[some >= 0].tolist() == (groups == number).nonzero()[:, 0].tolist()
            assert values[some < 0].eq(0).all()
    assert len(groups_at_once(groups, d=1, memory=1)) == 4
