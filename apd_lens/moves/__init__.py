"""Discrete changes of components between steps."""

from apd_lens.moves._cluster import ClusterMoves as ClusterMoves
from apd_lens.moves._division import DivisionMoves as DivisionMoves
from apd_lens.moves._moves import MoveContext as MoveContext
from apd_lens.moves._moves import Moves as Moves
from apd_lens.moves._split import SplitMoves as SplitMoves
