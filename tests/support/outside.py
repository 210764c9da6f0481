"""Running code as a user does: in a process of its own, without the tests' shape checks on every function."""

import subprocess
import sys
import textwrap
from collections.abc import Iterable


def run(code: str) -> str:
    """What the code prints. Fails with its standard error if it fails."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def errors_of(setup: str, codes: Iterable[str]) -> list[str]:
    """Type and message of the error of apd_lens that each piece of code raises, as "Type: message"."""
    code = f"""
for code in {list(codes)!r}:
    try:
        eval(code)
    except apd.ApdError as error:
        print(type(error).__name__, error, sep=": ", end="\\0")
    else:
        print("no error", end="\\0")
"""
    return run(textwrap.dedent(setup) + code).split("\0")[:-1]
