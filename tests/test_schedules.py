import pytest

import apd_lens as apd
from apd_lens._schedules import value_at


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (3.0, [3, 3, 3, 3, 3]),
        (apd.HoldThenDecay(2.0, hold=0.5, zero=1.0), [2, 2, 2, 1, 0]),
        (apd.Ramp(1.0, 5.0, hold=0.0, reach=0.5), [1, 3, 5, 5, 5]),
        (apd.Ramp(1.0, 5.0, hold=0.5, reach=0.5), [1, 1, 5, 5, 5]),  # a jump
    ],
)
def test_values_at_quarters(schedule, values):
    assert [value_at(schedule, quarter / 4) for quarter in range(5)] == values


@pytest.mark.parametrize(
    "make", [lambda: apd.HoldThenDecay(1.0, hold=0.9, zero=0.5), lambda: apd.Ramp(1.0, 2.0, hold=-0.1)]
)
def test_shares_in_the_wrong_order_are_refused(make):
    with pytest.raises(apd.errors.InvalidSetting, match="needs 0 <= hold <="):
        make()
