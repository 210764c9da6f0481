"""Training: a state, a step, and the loop over steps."""
