"""Several processes give what one gives with the same batches; what goes wrong in one is raised in all."""

from typing import Any

import pytest
import torch
from support.processes import CASES, all_cases, dying, failing, together

import apd_lens as apd


@pytest.fixture(scope="module")
def of_one() -> dict[str, dict[str, Any]]:
    return all_cases(0)


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
