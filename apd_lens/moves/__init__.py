"""Discrete changes of components between steps."""

from apd_lens.moves._moves import MoveContext as MoveContext
from apd_lens.moves._moves import Moves as Moves
