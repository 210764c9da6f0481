import pytest
import torch
from torch import nn

import apd_lens as apd


class Pair(nn.Module):
    def __init__(self, turned: bool):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        shared = self.first.weight.detach()
        self.last.weight = nn.Parameter(shared.T) if turned else self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(x)))


@pytest.mark.parametrize("turned", [False, True])
def test_tied_matrices_are_one_with_both_uses(turned: bool):
    model = Pair(turned)
    (tied,) = apd.wrap(model).weights.values()
    assert (tied.name, tied.tied_to) == ("first.weight", ("last.weight",))
    assert [(use.site, use.transposed) for use in tied.uses] == [("first", False), ("last", turned)]
    value = torch.randn(4, 4)
    state = tied.state(value)
    assert torch.equal(state["first.weight"], value.mT)
    assert torch.equal(state["last.weight"], value if turned else value.mT)


def test_a_tied_matrix_has_no_bias_and_an_untied_one_has():
    model = Pair(False)
    with pytest.raises(apd.UnsupportedModel):
        apd.wrap(model, biases=True)
    untied = apd.wrap(model).untied("last.weight")
    assert list(untied.weights) == ["first.weight", "last.weight"]
    assert all(len(matrix.uses) == 1 for matrix in untied.weights.values())
