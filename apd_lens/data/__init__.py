"""Batches: reading them, their data points, streams, finiteness."""
