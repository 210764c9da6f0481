"""Who did it: the effect of each component on the output, by several methods."""

from apd_lens.attribution._attribution import Attribution as Attribution
