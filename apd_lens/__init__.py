"""Attribution-based parameter decomposition of hooked models (Braun et al. 2025, arXiv 2501.14926).

    import apd_lens as apd

    decomposition = apd.decompose(model, batches, weights=["blocks.*.mlp.*"], n_components=60)

Types and shapes of arguments are checked here, at the edge, and not inside.
"""

from apd_lens import _components, _decompose, _losses, _product, _responses, _seeds, _selection
from apd_lens import metrics as metrics
from apd_lens import watch as watch
from apd_lens._attribution import AblationAttribution as AblationAttribution
from apd_lens._attribution import ActivationAttribution as ActivationAttribution
from apd_lens._attribution import GradientAttribution as GradientAttribution
from apd_lens._attribution import IntegratedGradients as IntegratedGradients
from apd_lens._checks import checked as _checked
from apd_lens._cluster_moves import ClusterMoves as ClusterMoves
from apd_lens._components import ParameterComponents as ParameterComponents
from apd_lens._components import random_components as random_components
from apd_lens._decompose import State as State
from apd_lens._decompose import StepInfo as StepInfo
from apd_lens._decompose import step as step
from apd_lens._decomposition import Decomposition as Decomposition
from apd_lens._decomposition import Summary as Summary
from apd_lens._decomposition import load as load
from apd_lens._division_moves import DivisionMoves as DivisionMoves
from apd_lens._editing import Edit as Edit
from apd_lens._editing import apply_edit as apply_edit
from apd_lens._errors import AlreadyActive as AlreadyActive
from apd_lens._errors import ApdError as ApdError
from apd_lens._errors import ApdWarning as ApdWarning
from apd_lens._errors import ArtifactError as ArtifactError
from apd_lens._errors import InvalidBatches as InvalidBatches
from apd_lens._errors import InvalidOutput as InvalidOutput
from apd_lens._errors import InvalidSetting as InvalidSetting
from apd_lens._errors import MissingExtra as MissingExtra
from apd_lens._errors import NonFinite as NonFinite
from apd_lens._errors import ShapeMismatch as ShapeMismatch
from apd_lens._errors import SiteNotCalled as SiteNotCalled
from apd_lens._errors import UnknownWeight as UnknownWeight
from apd_lens._errors import UnsupportedModel as UnsupportedModel
from apd_lens._errors import WeightsChanged as WeightsChanged
from apd_lens._losses import Losses as Losses
from apd_lens._moves import SplitMoves as SplitMoves
from apd_lens._responses import CoActivation as CoActivation
from apd_lens._responses import Effects as Effects
from apd_lens._responses import Responses as Responses
from apd_lens._responses import TopExamples as TopExamples
from apd_lens._schedules import HoldThenDecay as HoldThenDecay
from apd_lens._schedules import Ramp as Ramp
from apd_lens._selection import BatchTopK as BatchTopK
from apd_lens._selection import Lp as Lp
from apd_lens._selection import Needed as Needed
from apd_lens._selection import TopK as TopK
from apd_lens._settings import Optimization as Optimization
from apd_lens._settings import Settings as Settings
from apd_lens._settings import paper as paper
from apd_lens._target import Adapter as Adapter
from apd_lens._target import Bias as Bias
from apd_lens._target import Intercept as Intercept
from apd_lens._target import TargetModel as TargetModel
from apd_lens._target import Units as Units
from apd_lens._target import Use as Use
from apd_lens._target import WeightMatrix as WeightMatrix
from apd_lens._wrap import wrap as wrap

decompose = _checked(_decompose.decompose, InvalidSetting)
decompose_seeds = _checked(_seeds.decompose_seeds, InvalidSetting)
init = _checked(_decompose.init, InvalidSetting)

responses = _checked(_responses.responses, InvalidSetting)

faithfulness_loss = _checked(_losses.faithfulness_loss)
minimality_loss = _checked(_losses.minimality_loss)
simplicity_loss = _checked(_losses.simplicity_loss)
hidden_activation_loss = _checked(_losses.hidden_activation_loss)
kl_divergence = _checked(_losses.kl_divergence)
lp_sparsity = _checked(_losses.lp_sparsity)
path_mask = _checked(_losses.path_mask)

batch_topk_mask = _checked(_selection.batch_topk_mask)
topk_mask = _checked(_selection.topk_mask)

masked_product = _checked(_product.masked_product)
component_outputs = _checked(_product.component_outputs)
singular_values = _checked(_components.singular_values)
effective_rank = _checked(_components.effective_rank)
input_share = _checked(_components.input_share)
output_share = _checked(_components.output_share)

__version__ = "0.1.0"
