import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

import apd_lens as apd
from apd_lens._schedules import value_at
from apd_lens.losses._weights import weight_losses


def test_faithfulness_is_the_squared_distance():
    assert apd.faithfulness_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])) == 5


def test_mse_is_the_mean_over_outputs_and_data_points():
    target, sparse = torch.zeros(2, 3, 4), torch.full((2, 3, 4), 0.5)
    assert apd.minimality_loss(target, sparse) == 0.25


def test_kl_is_that_of_torch():
    target, other = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    expected = F.kl_div(other.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    assert_close(apd.losses.kl_divergence(target, other), expected)
    assert_close(apd.minimality_loss(target, other, "kl"), expected.mean())
    assert_close(apd.losses.kl_divergence(target, target + 3.0), torch.zeros(2, 3), rtol=0, atol=1e-6)


def test_a_distance_of_the_users_own():
    def largest(target, sparse):
        return (target - sparse).abs().amax(-1)

    target = torch.zeros(2, 3, 2)
    assert apd.minimality_loss(target, torch.tensor([1.0, -4.0]).expand(2, 3, 2), largest) == 4


def test_a_distance_that_is_no_scalar_a_data_point_is_refused():
    with pytest.raises(apd.ShapeMismatch, match=r"one scalar a data point, shape \(2, 3\) or \(2,\), got \(2, 3, 4\)"):
        apd.minimality_loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), lambda a, b: a - b)
    with pytest.raises(apd.ShapeMismatch, match=r"got \(\)"):
        apd.minimality_loss(torch.zeros(2, 4), torch.zeros(2, 4), lambda a, b: (a - b).mean())


@pytest.mark.parametrize("p", [0.5, 0.9, 1.0, 2.0])
def test_simplicity_is_the_schatten_norm_where_parts_are_orthogonal(p: float):
    A = torch.linalg.qr(torch.randn(3, 6, 2)).Q * torch.tensor([2.0, 0.5])
    B = torch.linalg.qr(torch.randn(3, 5, 2)).Q.mT
    mask = torch.tensor([[True, False, True], [True, False, False]])
    schatten = torch.linalg.svdvals(A @ B)[:, :2].pow(p).sum(1)
    assert_close(apd.simplicity_loss(A, B, mask, p), schatten @ torch.tensor([1.0, 0.0, 0.5]))


def test_simplicity_of_positions_is_a_mean_over_all_of_them():
    A, B = torch.randn(2, 3, 1), torch.randn(2, 1, 3)
    mask = torch.rand(4, 5, 2)
    assert_close(apd.simplicity_loss(A, B, mask, 0.9), apd.simplicity_loss(A, B, mask.flatten(0, 1), 0.9))


def test_simplicity_has_a_finite_gradient_at_zero():
    A = torch.zeros(1, 2, 1, requires_grad=True)
    apd.simplicity_loss(A, torch.zeros(1, 1, 2), torch.ones(1, 1), 0.9).backward()
    assert A.grad is not None
    assert A.grad.isfinite().all()


def test_path_masks_keep_the_active_on_and_draw_the_rest():
    mask = torch.zeros(200, 50, dtype=torch.bool)
    mask[:, :5] = True
    drawn = apd.masks.path_mask(mask, torch.Generator().manual_seed(0))
    assert (drawn[:, :5] == 1).all()
    rest = drawn[:, 5:]
    assert rest.min() >= 0
    assert rest.max() < 1
    assert abs(rest.mean().item() - 0.5) < 0.01
    assert abs(rest.std().item() - math.sqrt(1 / 12)) < 0.01


def test_coefficients_are_held_then_go_to_zero():
    schedule = apd.HoldThenDecay(2.0, hold=0.6, zero=0.8)
    values = [value_at(schedule, progress) for progress in (0.0, 0.59, 0.7, 0.8, 1.0)]
    assert values == pytest.approx([2.0, 2.0, 1.0, 0.0, 0.0])
    assert value_at(0.3, 0.99) == 0.3
    assert value_at(apd.HoldThenDecay(2.0, hold=0.5, zero=0.5), 0.49) == 2.0


def test_shapes_are_checked_at_the_edge():
    with pytest.raises(apd.ShapeMismatch, match=r"'summed'(.|\n)*f32\[3,3\](.|\n)*d_in d_out(.|\n)*d_in=2"):
        apd.faithfulness_loss(torch.zeros(2, 2), torch.zeros(3, 3))


@pytest.mark.parametrize(("d_in", "m", "d_out"), [(7, 2, 5), (30, 20, 25), (300, 16, 300)])
def test_weight_losses_have_the_gradients_of_the_formulas(d_in: int, m: int, d_out: int):
    """Component by component (rank 16 and more, matrices that a cache holds) and all at once."""
    weight = torch.randn(d_in, d_out, dtype=torch.float64)
    A, B, activity = (
        torch.rand(*shape, dtype=torch.float64).requires_grad_() for shape in [(4, d_in, m), (4, m, d_out), (10, 4)]
    )

    def plain(A: Tensor, B: Tensor, activity: Tensor) -> tuple[Tensor, Tensor]:
        often = activity.mean(-2)
        often = often + 0.5 * often.mean(-1, keepdim=True)
        norms = (A.square().sum(-2) * B.square().sum(-1)) ** 0.45
        return (weight - (A @ B).sum(-3)).square().sum((-2, -1)), (often * norms.sum(-1)).sum(-1)

    def ours(A: Tensor, B: Tensor, activity: Tensor) -> tuple[Tensor, Tensor]:
        return weight_losses(weight, A, B, activity, 0.9, 0.5)

    for ours_value, value in zip(ours(A, B, activity), plain(A, B, activity), strict=True):
        assert_close(ours_value, value, rtol=1e-9, atol=0)
        gradients, expected = (torch.autograd.grad(some.sum(), (A, B, activity), retain_graph=True, allow_unused=True)
                               for some in (ours_value, value))  # fmt: skip
        for one, other in zip(gradients, expected, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert_close(one, other, rtol=1e-8, atol=1e-10)
