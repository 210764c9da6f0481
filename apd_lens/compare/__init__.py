"""Decompositions beside what other methods find: circuits, heads and neurons, dictionaries of features.

Results are tensors in small dataclasses, each with a `.table()` for pandas. Needs pandas and scipy:
pip install 'apd-lens[compare]'.
"""

from apd_lens._errors import MissingExtra

try:
    import pandas as pd  # noqa: F401
    import scipy  # noqa: F401
except ImportError as error:
    raise MissingExtra(
        "apd_lens.compare needs pandas and scipy. Install them with pip install 'apd-lens[compare]'"
    ) from error

from apd_lens.compare._edits import EditEffects as EditEffects
from apd_lens.compare._edits import edit_effects as edit_effects

__all__ = [
    "EditEffects",
    "edit_effects",
]
