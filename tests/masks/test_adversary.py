import torch
from torch.testing import assert_close

from apd_lens.masks._adversary import ascend, harder


def test_the_harder_one_of_each_example():
    low, high = torch.zeros(2, 3), torch.ones(2, 3)
    gamma, error = harder(low, torch.tensor([1.0, 5.0]), high, torch.tensor([2.0, 4.0]))
    assert gamma.tolist() == [[1, 1, 1], [0, 0, 0]]
    assert error.tolist() == [2, 5]


def test_ascent_finds_the_corner_of_a_linear_error():
    """error = Σ_c a_c γ_c: largest with γ = 1 where a > 0, and at the lowest γ elsewhere."""
    a = torch.tensor([[1.0, -2.0, 3.0], [-1.0, 1.0, -1.0]])
    lowest, start = torch.tensor([[0.0, 0.5, 0.0], [0.0, 0.0, 0.25]]), torch.full((2, 3), 0.5)

    def errors(gamma: torch.Tensor) -> torch.Tensor:
        return (a * gamma).sum(-1)

    gamma, error = ascend(errors, start, errors(start), lowest, size=0.3, steps=4)
    expected = torch.where(a > 0, 1.0, lowest)
    assert_close(gamma, expected)
    assert_close(error, errors(expected))


def test_a_gradient_that_is_not_a_number_moves_nothing():
    start = torch.full((1, 2), 0.5)

    def errors(gamma: torch.Tensor) -> torch.Tensor:
        return gamma[:, 0] + (gamma[:, 1] - 0.5).abs().sqrt()  # infinite times zero at 0.5

    gamma, error = ascend(errors, start, errors(start), torch.zeros(1, 2), size=0.5, steps=1)
    assert_close(gamma, torch.tensor([[1.0, 0.5]]))
    assert error.item() == 1
