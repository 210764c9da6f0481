"""Attribution-based parameter decomposition of hooked models (Braun et al. 2025, arXiv 2501.14926).

    import apd_lens as apd

    decomposition = apd.decompose(model, batches, weights=["blocks.*.mlp.*"], n_components=60)

Types and shapes of arguments are checked here, at the edge, and not inside.
"""

from collections.abc import Iterable as _Iterable
from os import PathLike as _PathLike
from pathlib import Path as _Path
from typing import Any as _Any

from apd_lens import components as components
from apd_lens import decomposition as decomposition
from apd_lens import errors as errors
from apd_lens import language as language
from apd_lens import masks as masks
from apd_lens import metrics as metrics
from apd_lens import monitor as monitor
from apd_lens import moves as moves
from apd_lens import scan as scan
from apd_lens import training as training
from apd_lens._checks import checked as _checked
from apd_lens._codec import saved as saved
from apd_lens._errors import ApdError as ApdError
from apd_lens._errors import ArtifactError as ArtifactError
from apd_lens._errors import NonFinite as NonFinite
from apd_lens._errors import ShapeMismatch as ShapeMismatch
from apd_lens._errors import UnknownWeight as UnknownWeight
from apd_lens._errors import UnsupportedModel as UnsupportedModel
from apd_lens._memory import memory as memory
from apd_lens._schedules import HoldThenDecay as HoldThenDecay
from apd_lens._schedules import Ramp as Ramp
from apd_lens._settings import Elsewhere as Elsewhere
from apd_lens._settings import Optimization as Optimization
from apd_lens._settings import language_model as language_model
from apd_lens._settings import paper as paper
from apd_lens.attribution._ablation import AblationAttribution as AblationAttribution
from apd_lens.attribution._activation import ActivationAttribution as ActivationAttribution
from apd_lens.attribution._gradient import GradientAttribution as GradientAttribution
from apd_lens.attribution._integrated import IntegratedGradients as IntegratedGradients
from apd_lens.components._components import ParameterComponents as ParameterComponents
from apd_lens.decomposition._decomposition import Decomposition as Decomposition
from apd_lens.decomposition._editing import apply_edit as apply_edit
from apd_lens.decomposition._hub import from_pretrained as from_pretrained
from apd_lens.decomposition._load import from_factors as _from_factors
from apd_lens.decomposition._load import load as load
from apd_lens.host._matrix import WeightMatrix as WeightMatrix
from apd_lens.host._target import TargetModel as TargetModel
from apd_lens.host._wrap import wrap as wrap
from apd_lens.losses import faithfulness_loss as faithfulness_loss
from apd_lens.losses import minimality_loss as minimality_loss
from apd_lens.losses import simplicity_loss as simplicity_loss
from apd_lens.losses._losses import Losses as Losses
from apd_lens.masks._gates import Gates as Gates
from apd_lens.masks._lp import Lp as Lp
from apd_lens.masks._masking import Attributed as Attributed
from apd_lens.masks._selection import BatchTopK as BatchTopK
from apd_lens.masks._selection import TopK as TopK
from apd_lens.passes._positions import last_position as last_position
from apd_lens.passes._positions import positions as positions
from apd_lens.responses._top import responses as _responses
from apd_lens.scan._where import where as _where
from apd_lens.training import _loop, _state
from apd_lens.training._checkpoint import Checkpoint as Checkpoint
from apd_lens.training._step import step as step

decompose = _checked(_loop.decompose, errors.InvalidSetting)
from_factors = _checked(_from_factors)
init = _checked(_state.init, errors.InvalidSetting)
responses = _checked(_responses, errors.InvalidSetting)
where = _checked(_where, errors.InvalidSetting)


def _report(
    decomposition: Decomposition, batches: _Iterable[_Any], path: str | _PathLike[str], **options: _Any
) -> _Path:
    """Writes one self-contained HTML page to look at; `apd_lens.report.write_report` says what it takes.

    Raises:
        MissingExtra: plotly, jinja2 or pandas is not installed.
    """
    from apd_lens.report import write_report

    return write_report(decomposition, batches, path, **options)


Decomposition.report = _report  # here, since a report stands on all that can be asked of a decomposition

__version__ = "0.2.0"
