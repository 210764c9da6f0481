"""The example of several processes, by its launch line."""

import subprocess
import sys

from support.examples import EXAMPLES


def test_two_processes_give_the_factors_of_one():
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    few = ["--steps", "4", "--target-steps", "50"]
    done = subprocess.run(
        [*launch, EXAMPLES / "several_processes.py", *few], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4 steps: 2 processes")
    assert done.stdout.count("largest difference of a factor: ") == 1
    assert done.stderr.count("4/4") == 2  # a bar of all, and one of the process that trains alone
