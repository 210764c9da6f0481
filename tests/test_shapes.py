"""The shapes of every function of the package are checked in tests, at its first call in each."""

import pytest
import torch
from jaxtyping import TypeCheckError
from support import shapes

import apd_lens as apd
from apd_lens.losses._weights import faithfulness_loss


def test_the_first_call_in_a_test_is_checked_and_no_other():
    vector = torch.zeros(3)
    with pytest.raises(TypeCheckError):
        faithfulness_loss(vector, vector)
    assert faithfulness_loss(vector, vector) == 0
    shapes.seen.clear()
    with pytest.raises(TypeCheckError):
        faithfulness_loss(vector, vector)


def test_what_users_give_is_checked_at_every_call():
    for _ in range(3):
        with pytest.raises(apd.ShapeMismatch):
            apd.faithfulness_loss(torch.zeros(3), torch.zeros(3))
