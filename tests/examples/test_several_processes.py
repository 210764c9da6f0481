"""Several processes by their launch lines: the example, and a script in which accelerate starts the group."""

import json
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


SCRIPT = """
import sys, torch
from accelerate import Accelerator
import apd_lens as apd

if len(sys.argv) == 1:
    Accelerator(cpu=True)
torch.manual_seed(0)
model = torch.nn.Linear(4, 3).double()
data = torch.rand(8, 4, dtype=torch.float64)
options = {"optimization": apd.Optimization(steps=4), "progress": False}
decomposition = apd.decompose(model, [data], n_components=4, rank=2, **options)
number = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
values = [value for factor in decomposition.components.parameters() for value in factor.flatten().tolist()]
sys.stdout.write(f"{number} {values}\\n")  # at once, so that the lines of two are not mixed
"""


@pytest.mark.thorough
def test_the_process_group_of_an_accelerator(tmp_path):
    pytest.importorskip("accelerate")
    (tmp_path / "script.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = []
    for command in ([*launch, tmp_path / "script.py"], [sys.executable, tmp_path / "script.py", "alone"]):
        done = subprocess.run(command, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        found += [line.split(" ", 1) for line in done.stdout.decode().splitlines()]
    (two, one), (two_again, other), (alone, expected) = found
    assert (two, two_again, alone) == ("2", "2", "1")
    assert one == other
    assert json.loads(one) == pytest.approx(json.loads(expected), abs=1e-9)
