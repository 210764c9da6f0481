"""Comparisons of a decomposition with what other methods find: circuits, heads, neurons and dictionaries of features.

Results are tensors in small dataclasses, each with a `.table()` for pandas. Needs pandas:
pip install 'apd-lens[compare]'.
"""

from apd_lens._errors import MissingExtra

try:
    import pandas as pd  # noqa: F401
except ImportError as error:
    raise MissingExtra("apd_lens.compare needs pandas. Install it with pip install 'apd-lens[compare]'") from error

from apd_lens.compare._activations import ActivationMatch as ActivationMatch
from apd_lens.compare._activations import ActivationSums as ActivationSums
from apd_lens.compare._activations import activation_match as activation_match
from apd_lens.compare._activations import activation_measures as activation_measures
from apd_lens.compare._activations import activation_sums as activation_sums
from apd_lens.compare._architecture import ArchitectureMap as ArchitectureMap
from apd_lens.compare._architecture import MatrixAmounts as MatrixAmounts
from apd_lens.compare._architecture import weight_map as weight_map
from apd_lens.compare._attribution_map import attribution_map as attribution_map
from apd_lens.compare._circuit_files import read_circuit as read_circuit
from apd_lens.compare._circuits import Circuit as Circuit
from apd_lens.compare._circuits import circuit_of_edges as circuit_of_edges
from apd_lens.compare._circuits import circuit_of_scores as circuit_of_scores
from apd_lens.compare._dictionaries import Dictionary as Dictionary
from apd_lens.compare._dictionaries import random_dictionary as random_dictionary
from apd_lens.compare._directions import DirectionMatch as DirectionMatch
from apd_lens.compare._directions import direction_cosines as direction_cosines
from apd_lens.compare._directions import direction_match as direction_match
from apd_lens.compare._edits import EditEffects as EditEffects
from apd_lens.compare._edits import edit_effects as edit_effects
from apd_lens.compare._faithfulness import FaithfulnessCurve as FaithfulnessCurve
from apd_lens.compare._faithfulness import cmd as cmd
from apd_lens.compare._faithfulness import cpr as cpr
from apd_lens.compare._faithfulness import faithfulness_curve as faithfulness_curve
from apd_lens.compare._location import Location as Location
from apd_lens.compare._location import Overlap as Overlap
from apd_lens.compare._location import locate as locate
from apd_lens.compare._location import overlap as overlap
from apd_lens.compare._matching import Matching as Matching
from apd_lens.compare._matching import matching as matching
from apd_lens.compare._nodes import layer_of as layer_of
from apd_lens.compare._patching import PatchedComponents as PatchedComponents
from apd_lens.compare._patching import patching as patching
from apd_lens.compare._signed import SignedAttributions as SignedAttributions
from apd_lens.compare._signed import signed_attributions as signed_attributions
from apd_lens.compare._sparsity import Sparsity as Sparsity
from apd_lens.compare._sparsity import sparsity as sparsity
from apd_lens.compare._splice import spliced as spliced
