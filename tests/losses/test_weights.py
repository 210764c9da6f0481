import torch
from torch.testing import assert_close

from apd_lens.losses._weights import faithfulness_loss, lp_sparsity, simplicity_loss, weight_losses


def factors() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(3, 4, 2, dtype=torch.float64), torch.randn(3, 2, 5, dtype=torch.float64)


def test_simplicity_of_orthogonal_parts_is_the_schatten_norm():
    """diag(3, 4) as one component: 3^p + 4^p, where it is active."""
    A, B = torch.eye(2)[None], torch.diag(torch.tensor([3.0, 4.0]))[None]
    mask = torch.tensor([[True], [True], [False], [False]])
    assert_close(simplicity_loss(A, B, mask, p=1.0), torch.tensor(3.5))
    assert_close(simplicity_loss(A, B, mask, p=2.0), torch.tensor(12.5))
    assert_close(simplicity_loss(A, B, mask, p=1.0, floor=1.0), torch.tensor(7.0))


def test_both_losses_and_their_gradients_in_one_pass():
    A, B = (factor.requires_grad_() for factor in factors())
    W, mask = torch.randn(4, 5, dtype=torch.float64), torch.rand(6, 3) < 0.5
    together = weight_losses(W, A, B, mask, 0.9, 0.5)
    apart = faithfulness_loss(W, torch.einsum("cim,cmo->io", A, B)), simplicity_loss(A, B, mask, 0.9, 0.5)
    for one, other in zip(together, apart, strict=True):
        assert_close(one, other)
        gradients = (torch.autograd.grad(loss, (A, B), retain_graph=True) for loss in (one, other))
        for ours, theirs in zip(*gradients, strict=True):
            assert_close(ours, theirs)


def test_lp_by_hand_and_at_zero():
    attributions = torch.tensor([[4.0, 0.0]], requires_grad=True)
    values = lp_sparsity(attributions, 0.5)
    assert_close(values, torch.tensor([[2.0, 0.0]]), rtol=1e-5, atol=1e-3)
    values.sum().backward()
    assert attributions.grad.isfinite().all()
