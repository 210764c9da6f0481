"""The result: what can be asked of it, saved, loaded and edited."""
