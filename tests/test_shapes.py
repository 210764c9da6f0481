"""The shapes of every function of the package are checked in tests, at its first call in each."""

import pytest
import torch
from jaxtyping import TypeCheckError
from support import shapes

from apd_lens.losses._weights import faithfulness_loss


def test_the_first_call_in_a_test_is_checked_and_no_other():
    vector = torch.zeros(3)
    with pytest.raises(TypeCheckError):
        faithfulness_loss(vector, vector)
    assert faithfulness_loss(vector, vector) == 0
    shapes.seen.clear()
    with pytest.raises(TypeCheckError):
        faithfulness_loss(vector, vector)
