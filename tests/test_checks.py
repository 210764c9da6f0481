import random
from dataclasses import dataclass

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

import apd_lens as apd
from apd_lens._checks import check_fields, checked


@checked
def product(x: Float[Tensor, "n d"], y: Float[Tensor, "d m"]) -> Float[Tensor, "n m"]:
    return x @ y


def test_a_wrong_shape_is_named():
    assert torch.equal(product(torch.ones(2, 3), torch.ones(3, 1)), torch.full((2, 1), 3.0))
    with pytest.raises(apd.ShapeMismatch, match=r"y.*(?s:.*)d m"):
        product(torch.ones(2, 3), torch.ones(2, 1))


def test_of_a_long_argument_the_beginning_is_shown():
    decomposition = apd.init(torch.nn.Linear(4, 3), n_components=2).decomposition()
    with pytest.raises(apd.ShapeMismatch, match="ParameterComponents") as raised:
        apd.metrics.ranks(decomposition)
    assert "Actual value: Decomposition( …\n" in str(raised.value)
    assert len(str(raised.value)) < 500


def test_another_error_may_be_asked_for():
    def first(x: list[int]) -> int:
        return x[0]

    with pytest.raises(apd.errors.InvalidBatches):
        checked(first, apd.errors.InvalidBatches)("text")


def test_checks_leave_pythons_random_numbers_alone():
    @dataclass(frozen=True)
    class Settings:
        names: tuple[str, ...] = ("a", "b")

    before = random.getstate()
    check_fields(Settings())
    product(torch.ones(2, 3), torch.ones(3, 1))
    assert random.getstate() == before


@dataclass(frozen=True)
class Number:
    value: float


def test_fields_hold_what_they_are_annotated_with():
    check_fields(Number(1))  # an int is welcome
    with pytest.raises(apd.errors.InvalidSetting, match=r"Number\(value=\.\.\.\) takes float, got 'a'"):
        check_fields(Number("a"))  # type: ignore[arg-type]
    with pytest.raises(apd.errors.InvalidSetting, match="takes float, got True"):
        check_fields(Number(True))
    with pytest.raises(apd.errors.InvalidSetting, match="takes a number, got NaN"):
        check_fields(Number(float("nan")))
