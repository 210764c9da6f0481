"""Figures of decompositions. Functions of tensors, on any device and of any dtype, that return a matplotlib figure.

Where a figure is one plot, it is drawn on `ax` if that is given, else on a new figure. Tensors of another shape or type
raise ShapeMismatch. Colours can be told apart with any form of colour blindness.

Needs matplotlib: pip install 'apd-lens[plots]'.
"""

from apd_lens._errors import MissingExtra

try:
    from matplotlib import pyplot as plt
except ImportError as error:
    raise MissingExtra("apd_lens.plots needs matplotlib. Install it with pip install 'apd-lens[plots]'") from error

from apd_lens.plots._attributions import attribution_matrix as attribution_matrix
from apd_lens.plots._attributions import sorted_components as sorted_components
from apd_lens.plots._circuits import component_nodes as component_nodes
from apd_lens.plots._circuits import faithfulness as faithfulness
from apd_lens.plots._circuits import signed_by_position as signed_by_position
from apd_lens.plots._dictionaries import best_matches as best_matches
from apd_lens.plots._dictionaries import loss_against_sparsity as loss_against_sparsity
from apd_lens.plots._dictionaries import match_matrix as match_matrix
from apd_lens.plots._outputs import ablation_path as ablation_path
from apd_lens.plots._outputs import feature_loss as feature_loss
from apd_lens.plots._outputs import loss_by_active as loss_by_active
from apd_lens.plots._outputs import scrubbed_losses as scrubbed_losses
from apd_lens.plots._outputs import scrubbed_outputs as scrubbed_outputs
from apd_lens.plots._outputs import single_feature_responses as single_feature_responses
from apd_lens.plots._runs import alive_components as alive_components
from apd_lens.plots._runs import coefficient_valley as coefficient_valley
from apd_lens.plots._runs import loss_curves as loss_curves
from apd_lens.plots._runs import seed_stability as seed_stability
from apd_lens.plots._watch import edit_effects as edit_effects
from apd_lens.plots._watch import roc as roc
from apd_lens.plots._watch import score_histogram as score_histogram
from apd_lens.plots._weights import component_graph as component_graph
from apd_lens.plots._weights import components_by_feature as components_by_feature
from apd_lens.plots._weights import feature_vectors as feature_vectors
from apd_lens.plots._weights import neuron_contributions as neuron_contributions
from apd_lens.plots._weights import rank_and_share as rank_and_share
from apd_lens.plots._weights import unit_share as unit_share

__all__ = [
    "ablation_path",
    "alive_components",
    "attribution_matrix",
    "best_matches",
    "coefficient_valley",
    "component_graph",
    "component_nodes",
    "components_by_feature",
    "edit_effects",
    "faithfulness",
    "feature_loss",
    "feature_vectors",
    "loss_against_sparsity",
    "loss_by_active",
    "loss_curves",
    "match_matrix",
    "neuron_contributions",
    "plt",
    "rank_and_share",
    "roc",
    "score_histogram",
    "scrubbed_losses",
    "scrubbed_outputs",
    "seed_stability",
    "signed_by_position",
    "single_feature_responses",
    "sorted_components",
    "unit_share",
]
