import torch
from torch.testing import assert_close

from apd_lens.moves._surgery import part_for, refactor


def test_a_part_acts_on_given_inputs_and_not_on_kept_ones():
    A, e = torch.randn(4, 2), torch.eye(4)
    part = part_for(A, e[:2].repeat(5, 1), e[2:].repeat(5, 1), ridge=1e-6)
    assert_close(part[:2], A[:2], rtol=1e-4, atol=1e-4)
    assert part[2:].abs().max() < 1e-4
    lookups = part_for(A, torch.tensor([0, 1, 1]), torch.tensor([1, 2]))
    assert_close(lookups, torch.tensor([1.0, 2 / 3, 0.0, 0.0])[:, None] * A)


def test_few_and_many_data_points_give_the_same():
    """Two forms of one ridge regression: as many rows as columns, and the same rows twice with twice their number."""
    A, given, kept = torch.randn(5, 2).double(), torch.randn(2, 5).double(), torch.randn(2, 5).double()
    few = part_for(A, given, kept)
    many = part_for(A, given.repeat(3, 1), kept.repeat(3, 1), ridge=3e-3)
    assert_close(few, many)


def test_refactoring_writes_the_best_approximation_evenly_balanced():
    left, right = torch.randn(6, 4), torch.randn(4, 5)
    A, B = torch.randn(3, 6, 2), torch.randn(3, 2, 5)
    others = A[[0, 2]].clone()
    refactor(A, B, 1, left, right)
    U, singular, Vh = torch.linalg.svd(left @ right)
    assert_close(A[1] @ B[1], U[:, :2] * singular[:2] @ Vh[:2], rtol=1e-4, atol=1e-5)
    assert_close(A[1].norm(dim=0), B[1].norm(dim=1))
    assert torch.equal(A[[0, 2]], others)
