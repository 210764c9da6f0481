"""The result: what can be asked of it, saved, loaded and edited."""

from apd_lens._settings import Settings as Settings
from apd_lens.decomposition._card import Card as Card
from apd_lens.decomposition._editing import Edit as Edit
from apd_lens.decomposition._observed import Observed as Observed
from apd_lens.decomposition._summary import Summary as Summary
