"""Training: a state, a step, and the loop over steps."""

from apd_lens.training._state import State as State
from apd_lens.training._state import StepInfo as StepInfo
