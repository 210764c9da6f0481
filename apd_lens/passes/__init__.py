"""Forward passes of the user's model: watched, and with components in the place of weights."""
