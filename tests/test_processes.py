"""Several processes give what one gives with the same batches; what goes wrong in one is raised in all."""

import os
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
from support.processes import CASES, SHARDED, begin, dying, failing, finish, go_on, mlp, result, together

import apd_lens as apd

SLOW = ("gates, attacked, sharded", "other data, sharded")


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.thorough] * (case in SLOW)) for case in (*CASES, *SHARDED)]
)
def test_several_processes_give_what_one_gives(case: str, n: int):
    expected = result(SHARDED.get(case, case), 0)
    found = together(n, partial(result, case))
    for came in found:
        if isinstance(came, BaseException):
            raise came
        assert came["selection"] == expected["selection"]
        assert came["moves"] == expected["moves"]
        assert came["k"] == pytest.approx(expected["k"])
        assert [*came["terms"][0]] == [*expected["terms"][0]]
        for ours, theirs in zip(came["terms"], expected["terms"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-9)
        for ours, theirs, first in zip(came["factors"], expected["factors"], found[0]["factors"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
            assert torch.equal(ours, first)
    if "moves" in case:
        assert expected["moves"]


@pytest.mark.thorough
def test_a_training_goes_on_in_another_number_of_processes(tmp_path):
    """From one to two, from four to two and from two to one, its components divided or not before and after."""
    together(1, partial(begin, tmp_path / "of one"))
    together(4, partial(begin, tmp_path / "of four"))
    for begun in ("of one/whole", "of four/whole", "of four/sharded"):
        assert os.listdir(tmp_path / begun) == ["step-000004.safetensors"]
    found = []
    for trainings, factors, text in together(2, partial(go_on, tmp_path)):
        loaded = apd.load(tmp_path / "result", mlp())
        assert [*map(torch.equal, loaded.components.parameters(), factors)] == [True] * len(factors)
        assert "6 components over" in text
        found += trainings
    expected, *of_two = together(1, partial(finish, tmp_path))[0]
    found += of_two
    assert len(found) == 10
    for one in found:
        assert 0 < one["moves"] < expected["moves"]
        for ours, theirs in zip(one["factors"], expected["factors"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_what_goes_wrong_in_one_is_raised_in_all():
    one, other = together(2, failing)
    for name, (error, message) in {
        "NaN": (apd.NonFinite, "step 3: input tensor 0 of the batch"),
        "different batches": (
            apd.errors.InvalidBatches,
            "step 0: the processes were given different batches.*seed what",
        ),
        "another order": (apd.errors.InvalidBatches, "different batches"),
        "different sizes": (apd.errors.InvalidBatches, "different batches"),
        "different settings": (apd.errors.InvalidSetting, "different models or settings"),
        "different models": (apd.errors.InvalidSetting, "different models or settings"),
        "few examples": (apd.errors.InvalidBatches, "1 examples, and each of the 2 processes takes a part"),
        "a wrong call in one": (apd.errors.InvalidSetting, "TopK.*needs 0 < k <= n_components"),
        "an error in one": (apd.ApdError, "Process 1 stopped: ValueError: no more"),
    }.items():
        assert one[name][0] is error, name
        assert other[name][0] is (ValueError if name == "an error in one" else error), name
        assert re.search(message, one[name][1]), one[name][1]
        assert one[name][2] == other[name][2] == (name in ("NaN", "an error in one"))
    error, message, unfinished, notes = one["NaN, looked at late"]
    assert (error, message, unfinished) == (apd.NonFinite, "Another process met NaN or infinity.", True)
    assert f"Process 1 stopped: {other['NaN, looked at late'][1]}" in notes
    assert one["NaN"][1] == f"Process 1 stopped: {other['NaN'][1]}"
    assert one["after"]["factors"][0].equal(other["after"]["factors"][0])


@pytest.mark.parametrize(("n", "sharded"), [(2, False), (4, True)])
def test_a_process_that_ends_ends_the_others(tmp_path, n: int, sharded: bool):
    found = together(n, partial(dying, tmp_path, sharded))
    assert found.pop(1) is None
    for seconds, message, notes in found:
        assert seconds < 60
        assert re.match(f"Another of the {n} processes ended, or cannot be reached, while this one was at", message)
        newest = (
            f"so the newest checkpoint is that of step 2. decompose(…, resume={str(tmp_path)!r}) goes on from there"
        )
        last = f"decompose(…, resume={str(tmp_path / 'step-000003.safetensors')!r}) goes on behind step 2"
        assert (newest if sharded else last) in notes[0]


THREADS = """
import atexit, os, sys
import torch

def threads():
    return set(os.listdir("/proc/self/task"))

atexit.register(lambda: print(len(during - before), len(threads() - before)))  # runs last
from apd_lens import _processes

here = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}/store", rank=here, world_size=2)
before = threads()
_processes.wait_for_all()
during = threads()
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="threads of Linux")
def test_no_thread_of_ours_is_left_when_python_ends(tmp_path):
    """One that lets go of a tensor later aborts the process."""
    commands = [[sys.executable, "-c", THREADS, str(rank), tmp_path] for rank in range(2)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE) for command in commands]
    for process in started:
        during, after = map(int, process.communicate()[0].split())
        assert (process.returncode, after) == (0, 0)
        assert during > 0
