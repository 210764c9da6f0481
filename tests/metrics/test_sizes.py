import torch
from torch.testing import assert_close

import apd_lens as apd
from apd_lens.metrics._sizes import description_length, layer_share, ranks


def parts() -> apd.ParameterComponents:
    """Component 0 is diag(3, 4) in a and nothing in b, component 1 is diag(5, 0) in both."""
    eye = torch.eye(2).expand(2, 2, 2).clone()
    a = torch.stack([torch.diag(torch.tensor([3.0, 4.0])), torch.diag(torch.tensor([5.0, 0.0]))])
    b = torch.stack([torch.zeros(2, 2), torch.diag(torch.tensor([5.0, 0.0]))])
    return apd.ParameterComponents({"a": eye, "b": eye.clone()}, {"a": a, "b": b})


def test_ranks_and_shares_of_matrices():
    assert ranks(parts()).tolist() == [[2, 0], [1, 1]]
    assert_close(layer_share(parts()).sum(1), torch.ones(2))
    assert_close(layer_share(parts()), torch.tensor([[1.0, 0.0], [0.5, 0.5]]))


def test_description_length_by_hand():
    """Two of eight components a data point: 2 · 3 bits to name them, and α for each of their ranks 1 and 3."""
    mask = torch.zeros(5, 8, dtype=torch.bool)
    mask[:, [0, 1]] = True
    rank = torch.tensor([1.0, 3.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0])
    length = description_length(mask, rank, alpha=0.5)
    assert (length.selection, length.parameters, length.total) == (6, 2, 8)
