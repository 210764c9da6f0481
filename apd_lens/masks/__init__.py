"""Which components are active: selections, drawn masks and attacked ones."""

from apd_lens._checks import checked
from apd_lens._processes import gathered as gathered
from apd_lens.masks import _sampling, _selection
from apd_lens.masks._masking import Masking as Masking
from apd_lens.masks._masking import Masks as Masks
from apd_lens.masks._selection import Needed as Needed
from apd_lens.masks._selection import Selection as Selection

batch_topk_mask = checked(_selection.batch_topk_mask)
topk_mask = checked(_selection.topk_mask)
path_mask = checked(_sampling.path_mask)
