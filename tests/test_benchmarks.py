"""The yardstick of the benchmarks computes the golden numbers."""

import sys
from pathlib import Path

import pytest
import torch
from support.examples import run
from support.golden import EXACT, residual_mlp, tms
from torch import nn
from torch.testing import assert_close

import apd_lens as apd

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import textbook  # noqa: E402
from training_step import Case  # noqa: E402


@pytest.mark.parametrize("make", [tms, residual_mlp])
def test_ten_textbook_steps_equal_the_golden_ones(make):
    case = make()
    state = case.state(k=case.settings["k"])
    weights = {name: state.weights[name] for name in case.names}
    sites = [
        textbook.Site(use.site, use.matrix, use.transposed)
        for name in case.names
        for use in state.target.weights[name].uses
    ]
    book = textbook.Textbook(sites, weights, case.settings["k"], state.settings.losses)
    A, B = (
        {name: nn.Parameter(factor.detach().clone()) for name, factor in factors.items()}
        for factors in (state.components.A, state.components.B)
    )
    optimizer = torch.optim.Adam([*A.values(), *B.values()], lr=case.settings["lr"])
    losses = [textbook.step(case.model, book, A, B, optimizer, batch) for batch in case.tensors["train.batches"]]
    offset = case.settings["coefficients"]["simplicity"] * case.simplicity_offset()
    assert_close(torch.stack(losses) + offset, case.tensors["train.loss_per_step"], **EXACT)
    for name, golden in case.names.items():
        assert_close(A[name].detach(), case.tensors[f"train.final_A.{golden}"], **EXACT)
        assert_close(B[name].detach(), case.tensors[f"train.final_B.{golden}"], **EXACT)
    assert isinstance(book.losses, apd.Losses)


@pytest.mark.parametrize("case", [Case("mlp", 2, 32), Case("tms", 1, 64)], ids=str)
def test_what_is_timed_is_the_same_work(case):
    """Two steps: the losses agree before and after an update."""
    textbook_step, ours = case.runner("textbook"), case.runner("exact")
    for _ in range(2):
        assert_close(ours(), textbook_step(), rtol=1e-4, atol=0)


@pytest.mark.thorough
def test_the_defaults_are_measured_beside_random_components(tmp_path):
    """A few steps; what is there is not run again."""
    few = ["--quick", "--systems", "gated", "addition", "--seeds", "0", "1", "--out", str(tmp_path)]
    printed = run("../benchmarks/defaults.py", *few)
    assert printed.count(" seed ") == 4
    assert "| gated functions | 0 of 2 |" in printed
    assert " of 49 |" in printed
    again = run("../benchmarks/defaults.py", *few)
    assert " seed " not in again
    assert again.splitlines() == printed.splitlines()[-len(again.splitlines()) :]
