"""Running an example as a user does."""

from pathlib import Path

from support import outside

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script: str, *arguments: str) -> str:
    return outside.script(EXAMPLES / script, *arguments)
