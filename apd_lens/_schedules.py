"""Numbers that change during training: loss coefficients, and the number of active components."""

from dataclasses import dataclass

from apd_lens._checks import check_fields
from apd_lens._codec import saved
from apd_lens._errors import InvalidSetting


@saved
@dataclass(frozen=True)
class HoldThenDecay:
    """A coefficient that is constant at first and then falls linearly to zero.

    Meant for the simplicity coefficient. Components that simplicity has formed stay formed without it, and removing it
    at the end removes the shrinkage that it causes.

    Attributes:
        value: the constant coefficient.
        hold: share of the steps during which the number is constant.
        zero: share of the steps after which the coefficient is 0.
    """

    value: float
    hold: float = 0.6
    zero: float = 0.8

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.hold <= self.zero:
            raise InvalidSetting(f"HoldThenDecay needs 0 <= hold <= zero, got hold={self.hold}, zero={self.zero}.")


@saved
@dataclass(frozen=True)
class Ramp:
    """A number that is constant at first and then moves linearly to another.

    Attributes:
        start: the number at first.
        end: the number at the end.
        hold: share of the steps during which the number is constant.
        reach: share of the steps after which the number is `end`.
    """

    start: float
    end: float
    hold: float = 0.6
    reach: float = 0.8

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.hold <= self.reach:
            raise InvalidSetting(f"Ramp needs 0 <= hold <= reach, got hold={self.hold}, reach={self.reach}.")


Schedule = float | HoldThenDecay | Ramp


def value_at(schedule: Schedule, progress: float) -> float:
    """The number when `progress`, a share of the steps, is done."""
    if isinstance(schedule, HoldThenDecay):
        schedule = Ramp(schedule.value, 0.0, schedule.hold, schedule.zero)
    if not isinstance(schedule, Ramp):
        return schedule
    if progress < schedule.hold:
        return schedule.start
    if progress >= schedule.reach:
        return schedule.end
    share = (progress - schedule.hold) / (schedule.reach - schedule.hold)
    return schedule.start + (schedule.end - schedule.start) * share
