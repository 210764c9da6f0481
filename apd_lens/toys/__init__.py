"""Small models with known mechanisms, their data, and functions that train or build them: the paper's, and one of
facts.

Source: Braun et al. 2025, arXiv 2501.14926. Batches are drawn on the CPU from a seeded generator, models are made
there, and the same seed gives the same model and the same batches.
"""

from apd_lens.toys._facts import FactsTarget as FactsTarget
from apd_lens.toys._facts import centred_logits as centred_logits
from apd_lens.toys._facts import facts_settings as facts_settings
from apd_lens.toys._facts import train_facts as train_facts
from apd_lens.toys._gated import GatedFunctions as GatedFunctions
from apd_lens.toys._gated import GatedTarget as GatedTarget
from apd_lens.toys._gated import gated_data as gated_data
from apd_lens.toys._gated import gated_labels as gated_labels
from apd_lens.toys._gated import make_gated_functions as make_gated_functions
from apd_lens.toys._gated import piecewise_linear as piecewise_linear
from apd_lens.toys._induction import InductionTarget as InductionTarget
from apd_lens.toys._induction import Sequences as Sequences
from apd_lens.toys._induction import next_token_losses as next_token_losses
from apd_lens.toys._induction import sequences as sequences
from apd_lens.toys._induction import train_induction as train_induction
from apd_lens.toys._residual_mlp import ResidualMLP as ResidualMLP
from apd_lens.toys._residual_mlp import ResidualMLPTarget as ResidualMLPTarget
from apd_lens.toys._residual_mlp import residual_mlp_data as residual_mlp_data
from apd_lens.toys._residual_mlp import residual_mlp_labels as residual_mlp_labels
from apd_lens.toys._residual_mlp import train_residual_mlp as train_residual_mlp
from apd_lens.toys._tms import TMS as TMS
from apd_lens.toys._tms import TMSTarget as TMSTarget
from apd_lens.toys._tms import tms_data as tms_data
from apd_lens.toys._tms import train_tms as train_tms
