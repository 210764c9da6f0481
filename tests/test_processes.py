"""Several processes give what one gives with the same batches; what goes wrong in one is raised in all."""

import re
from typing import Any

import pytest
import torch
from support.processes import CASES, all_cases, dying, failing, together

import apd_lens as apd


@pytest.fixture(scope="module")
def of_one() -> dict[str, dict[str, Any]]:
    return together(1, all_cases)[0]


@pytest.fixture(scope="module", params=[2, 4])
def of_each(request: pytest.FixtureRequest) -> list[dict[str, dict[str, Any]]]:
    found = together(request.param, all_cases)
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return found


@pytest.mark.parametrize("case", CASES)
def test_several_processes_give_what_one_gives(case: str, of_one: dict[str, Any], of_each: list[dict[str, Any]]):
    expected = of_one[case]
    for one in of_each:
        came = one[case]
        assert came["selection"] == expected["selection"]
        assert came["moves"] == expected["moves"]
        assert came["k"] == pytest.approx(expected["k"])
        assert [*came["terms"][0]] == [*expected["terms"][0]]
        for ours, theirs in zip(came["terms"], expected["terms"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-9)
        for ours, theirs, first in zip(came["factors"], expected["factors"], of_each[0][case]["factors"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
            assert torch.equal(ours, first)
    if "moves" in case:
        assert expected["moves"]


def test_what_goes_wrong_in_one_is_raised_in_all():
    one, other = together(2, failing)
    for name, (error, message) in {
        "NaN": (apd.NonFinite, "step 3: input tensor 0 of the batch"),
        "different batches": (apd.InvalidBatches, "step 0: the processes were given different batches.*seed what"),
        "another order": (apd.InvalidBatches, "different batches"),
        "different sizes": (apd.InvalidBatches, "different batches"),
        "different settings": (apd.InvalidSetting, "different models or settings"),
        "different models": (apd.InvalidSetting, "different models or settings"),
        "few examples": (apd.InvalidBatches, "1 examples, and each of the 2 processes takes a part"),
        "a wrong call in one": (apd.InvalidSetting, "TopK.*needs 0 < k <= n_components"),
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


def test_a_process_that_ends_ends_the_others():
    (seconds, message), ended = together(2, dying)
    assert ended is None
    assert seconds < 60
    assert re.match("Another of the 2 processes ended, or cannot be reached, while this one was at", message)
