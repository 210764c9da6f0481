"""Discrete changes of components between steps."""
