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
from apd_lens.compare._circuits import Circuit as Circuit
from apd_lens.compare._circuits import Location as Location
from apd_lens.compare._circuits import Overlap as Overlap
from apd_lens.compare._circuits import circuit_of_edges as circuit_of_edges
from apd_lens.compare._circuits import circuit_of_scores as circuit_of_scores
from apd_lens.compare._circuits import locate as locate
from apd_lens.compare._circuits import overlap as overlap
from apd_lens.compare._circuits import read_circuit as read_circuit
from apd_lens.compare._faithfulness import FaithfulnessCurve as FaithfulnessCurve
from apd_lens.compare._faithfulness import cmd as cmd
from apd_lens.compare._faithfulness import cpr as cpr
from apd_lens.compare._faithfulness import faithfulness_curve as faithfulness_curve
from apd_lens.compare._signed import SignedAttributions as SignedAttributions
from apd_lens.compare._signed import signed_attributions as signed_attributions

__all__ = [
    "ArchitectureMap",
    "Circuit",
    "FaithfulnessCurve",
    "Location",
    "MatrixAmounts",
    "Overlap",
    "SignedAttributions",
    "attribution_map",
    "circuit_of_edges",
    "circuit_of_scores",
    "cmd",
    "cpr",
    "faithfulness_curve",
    "layer_of",
    "locate",
    "overlap",
    "read_circuit",
    "signed_attributions",
    "weight_map",
]
