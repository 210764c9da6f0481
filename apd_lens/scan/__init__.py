"""Which matrices, at which positions, carry a behaviour."""

from apd_lens.scan._result import Together as Together
from apd_lens.scan._result import Where as Where
