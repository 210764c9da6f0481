"""The example of several processes, by its launch line."""

import subprocess
import sys

import pytest
from support.examples import EXAMPLES


@pytest.mark.thorough
def test_two_processes_give_the_factors_of_one():
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    few = ["--steps", "4", "--target-steps", "50"]
    done = subprocess.run([*launch, EXAMPLES / "several_processes.py", *few], capture_output=True, check=False)
    printed, errors = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 0, errors
    assert printed.startswith("4 steps: 2 processes")
    assert printed.count("largest difference of a factor: ") == 1
    bars = [line for line in errors.split("\n") if "4/4" in line]  # each is drawn anew in its own line
    assert len(bars) == 2  # that of all, and that of the process that trains alone
