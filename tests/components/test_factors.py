import torch
from torch.testing import assert_close

from apd_lens.components._factors import column_squares, full_precision, inner_products, share_of_units
from apd_lens.components._factors import sum_of_components as summed


def factors(C: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(C, 4, 2), torch.randn(C, 2, 5)


def test_sums_and_inner_products_are_those_of_the_built_components():
    (A, B), (other_A, other_B) = factors(), factors(2)
    P, Q = A @ B, other_A @ other_B
    assert_close(summed(A, B), P.sum(0))
    assert_close(inner_products(A, B, other_A, other_B), torch.einsum("cio,dio->cd", P, Q), rtol=1e-4, atol=1e-5)


def test_shares_of_columns():
    A, B = factors()
    squares = (A @ B).square().sum(1)
    assert_close(column_squares(A, B), squares, rtol=1e-4, atol=1e-5)
    assert_close(share_of_units(A, B), squares / squares.sum(0), rtol=1e-4, atol=1e-5)


def test_autocast_is_off_inside_and_on_again_afterwards():
    A, B = factors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert summed(A, B).dtype == torch.float32
        with full_precision():
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")
