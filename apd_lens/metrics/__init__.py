"""Measures of a decomposition. All are pure functions; the caller gives the truth where a measure needs it.

Weights are `d_in d_out`, so what the paper calls columns are rows here. Source of all definitions unless another is
named: Braun et al. 2025, arXiv 2501.14926. Arguments of another type or shape raise ShapeMismatch.
"""

from apd_lens._checks import checked
from apd_lens.components import effective_rank as effective_rank
from apd_lens.masks._sampling import anti_scrubbed_mask as anti_scrubbed_mask
from apd_lens.masks._sampling import scrubbed_mask as scrubbed_mask
from apd_lens.metrics import _stability
from apd_lens.metrics._agreement import Agreement as Agreement
from apd_lens.metrics._agreement import agreement as agreement
from apd_lens.metrics._audit import Audit as Audit
from apd_lens.metrics._audit import audit as audit
from apd_lens.metrics._auroc import auroc as auroc
from apd_lens.metrics._mechanisms import best_components as best_components
from apd_lens.metrics._mechanisms import features_alone as features_alone
from apd_lens.metrics._mechanisms import ml2r as ml2r
from apd_lens.metrics._mechanisms import mmcs as mmcs
from apd_lens.metrics._mechanisms import neuron_contributions as neuron_contributions
from apd_lens.metrics._sizes import DescriptionLength as DescriptionLength
from apd_lens.metrics._sizes import description_length as description_length
from apd_lens.metrics._sizes import layer_share as layer_share
from apd_lens.metrics._sizes import ranks as ranks
from apd_lens.metrics._stability import Stability as Stability

stability = checked(_stability.stability)
