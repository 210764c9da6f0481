"""Who did it: the effect of each component on the output, by several methods."""
