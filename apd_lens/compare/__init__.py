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

from apd_lens.compare._activations import ActivationMatch as ActivationMatch
from apd_lens.compare._activations import ActivationSums as ActivationSums
from apd_lens.compare._activations import activation_match as activation_match
from apd_lens.compare._activations import activation_measures as activation_measures
from apd_lens.compare._activations import activation_sums as activation_sums
from apd_lens.compare._dictionaries import Dictionary as Dictionary
from apd_lens.compare._dictionaries import random_dictionary as random_dictionary
from apd_lens.compare._dictionaries import spliced as spliced
from apd_lens.compare._directions import DirectionMatch as DirectionMatch
from apd_lens.compare._directions import direction_cosines as direction_cosines
from apd_lens.compare._directions import direction_match as direction_match
from apd_lens.compare._matching import Matching as Matching
from apd_lens.compare._matching import matching as matching
from apd_lens.compare._sparsity import Sparsity as Sparsity
from apd_lens.compare._sparsity import sparsity as sparsity

__all__ = [
    "ActivationMatch",
    "ActivationSums",
    "Dictionary",
    "DirectionMatch",
    "Matching",
    "Sparsity",
    "activation_match",
    "activation_measures",
    "activation_sums",
    "direction_cosines",
    "direction_match",
    "matching",
    "random_dictionary",
    "sparsity",
    "spliced",
]
