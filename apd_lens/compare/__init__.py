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

from apd_lens.compare._architecture import ArchitectureMap as ArchitectureMap
from apd_lens.compare._architecture import MatrixAmounts as MatrixAmounts
from apd_lens.compare._architecture import attribution_map as attribution_map
from apd_lens.compare._architecture import layer_of as layer_of
from apd_lens.compare._architecture import weight_map as weight_map

__all__ = ["ArchitectureMap", "MatrixAmounts", "attribution_map", "layer_of", "weight_map"]
