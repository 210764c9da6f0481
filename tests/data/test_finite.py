import pytest
import torch

import apd_lens as apd
from apd_lens.data._finite import LateChecks, Reading, count_not_finite, raise_first


def reading(value: float, name: str = "it") -> Reading:
    return Reading(torch.tensor(value), lambda count: f"{name} is {count:.0f}")


def test_nan_and_both_infinities_are_counted():
    assert count_not_finite(torch.tensor([1.0, float("nan"), float("inf"), -float("inf"), 0.0])) == 3


def test_the_first_reading_that_is_not_zero_is_raised():
    raise_first([reading(0), reading(0)])
    with pytest.raises(apd.NonFinite, match="b is 2"):
        raise_first([reading(0, "a"), reading(2, "b"), reading(3, "c")])


def test_late_checks_say_at_once_on_the_device_and_late_to_the_host():
    late = LateChecks(torch.device("cpu"))
    late.add([reading(0)])
    assert late.failed == 0
    late.add([reading(0), reading(4, "step 1")])
    assert late.failed == 1  # the optimizer changes nothing from here on
    late.add([reading(0)])
    assert late.failed == 1
    late.read(but=2)
    with pytest.raises(apd.NonFinite, match="step 1 is 4"):
        late.read(but=1)
    assert late.failed == 0
    late.read()  # the training can go on
