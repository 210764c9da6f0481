"""Running code and scripts as a user does: in a process of its own, without the tests' shape checks on every function.

`run` and `script` start from a process that has imported the large libraries already, which takes seconds; `fresh`
starts with nothing imported.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterable
from pathlib import Path

PRELOADED = ["apd_lens.plots", "apd_lens.report", "matplotlib.pyplot", "transformer_lens"]  # those that are installed
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def run(code: str) -> str:
    """What the code prints. Fails with its standard error if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "code.py"
        file.write_text(textwrap.dedent(code))
        return script(file)


def script(file: Path, *arguments: str) -> str:
    """What the script prints, run with these arguments. Fails with its standard error if it fails."""
    context = multiprocessing.get_context(METHOD)
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        printed, errors = Path(folder) / "printed", Path(folder) / "errors"
        process = context.Process(target=_work, args=(str(file), arguments, printed, errors))
        process.start()
        process.join(300)
        process.kill()
        process.join()
        assert process.exitcode == 0, errors.read_text()
        return printed.read_text()


def _work(file: str, arguments: Iterable[str], printed: Path, errors: Path) -> None:
    for path, stream in ((printed, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    sys.argv = [file, *arguments]
    sys.path.insert(0, str(Path(file).parent))
    runpy.run_path(file, run_name="__main__")


def fresh(code: str) -> str:
    """What the code prints, in a new interpreter. Fails with its standard error if it fails."""
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
