"""Which matrices, at which positions, carry a behaviour."""
