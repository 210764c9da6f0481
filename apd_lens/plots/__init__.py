"""Figures of decompositions. Each function takes tensors, on any device and of any dtype, and returns a matplotlib
figure.

A figure is drawn on `ax` if you give it (axes, or as many as the figure has plots), and on a new figure otherwise.
Tensors of the wrong shape or type raise ShapeMismatch. The colours are distinct with any form of colour blindness.

Needs matplotlib: pip install 'apd-lens[plots]'.
"""

from apd_lens._errors import MissingExtra

try:
    import matplotlib  # noqa: F401
except ImportError as error:
    raise MissingExtra("apd_lens.plots needs matplotlib. Install it with pip install 'apd-lens[plots]'") from error

from apd_lens.plots._attributions import attribution_matrix as attribution_matrix
from apd_lens.plots._attributions import sorted_components as sorted_components
from apd_lens.plots._audit import audit as audit
from apd_lens.plots._circuits import component_nodes as component_nodes
from apd_lens.plots._circuits import faithfulness as faithfulness
from apd_lens.plots._circuits import signed_by_position as signed_by_position
from apd_lens.plots._dictionaries import best_matches as best_matches
from apd_lens.plots._dictionaries import loss_against_sparsity as loss_against_sparsity
from apd_lens.plots._dictionaries import match_matrix as match_matrix
from apd_lens.plots._runs import alive_components as alive_components
from apd_lens.plots._runs import loss_curves as loss_curves
from apd_lens.plots._runs import seed_stability as seed_stability
from apd_lens.plots._watch import edit_effects as edit_effects
from apd_lens.plots._watch import roc as roc
from apd_lens.plots._watch import score_histogram as score_histogram
from apd_lens.plots._weights import rank_and_share as rank_and_share
from apd_lens.plots._weights import unit_share as unit_share
from apd_lens.plots._where import where as where
