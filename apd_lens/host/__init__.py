"""The user's model: its weight matrices, and a forward pass in which each use can be intercepted. Adapters stand on
this room alone."""

from apd_lens._block import Block as Block
from apd_lens._block import Part as Part
from apd_lens.data._batch import are_texts as are_texts
from apd_lens.data._batch import arguments as arguments
from apd_lens.host._adapter import Adapter as Adapter
from apd_lens.host._adapter import Intercept as Intercept
from apd_lens.host._matrix import Bias as Bias
from apd_lens.host._matrix import Units as Units
from apd_lens.host._matrix import Use as Use
from apd_lens.host._matrix import WeightMatrix as WeightMatrix
from apd_lens.host._patch import PatchedForward as PatchedForward
from apd_lens.host._target import TargetModel as TargetModel
from apd_lens.host._torch_modules import TorchAdapter as TorchAdapter
from apd_lens.host._wrap import wrap as wrap
