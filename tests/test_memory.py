import multiprocessing
import os
from typing import Any

import pytest
import torch
from support.outside import METHOD, PRELOADED
from support.peaks import peaks_of
from support.toy_models import tiny_llama

import apd_lens as apd
from apd_lens._memory import BUDGET, at_once, chunks, fitting, n_bytes, slices


def test_at_least_one_fits_and_no_more_than_the_memory_holds():
    assert [fitting(100, memory) for memory in (1, 199, 200, 1000)] == [1, 1, 2, 10]
    assert fitting(BUDGET / 4) == 4
    assert fitting(0, memory=7) == 7


def test_pieces_cover_everything_once():
    for length, most in ((0, 3), (1, 3), (3, 3), (7, 3), (8, 1)):
        pieces = slices(length, most)
        assert [i for piece in pieces for i in range(length)[piece]] == list(range(length))
        assert all(0 < piece.stop - piece.start <= most for piece in pieces)
    assert chunks(5, 10, memory=20) == slices(5, 2)


def test_a_limit_is_a_number_or_a_text():
    assert [n_bytes(text) for text in (5, "5", "2 KB", "1.5GB", "10 mb")] == [5, 5, 2000, 1_500_000_000, 10_000_000]
    for wrong in ("", "much", "4 TB", -1, 0):
        with pytest.raises(apd.errors.InvalidSetting, match="4 GB"):
            n_bytes(wrong)


def test_inside_a_limit_less_fits_and_afterwards_as_much_as_before():
    assert at_once(10, 10**12) == 10
    with apd.memory(1000):
        assert fitting(1) == fitting(1, memory=10**9) == 250
        assert fitting(1, memory=10) == 10
        assert at_once(1000, 10) == 75
        assert at_once(1000, 10, kept=200) == 60
        with apd.memory(None):
            assert at_once(1000, 10) == 75
    assert fitting(BUDGET / 4) == 4


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks are read from Linux's /proc")
@pytest.mark.parametrize("what", ["step", "analysis", "start"])
def test_a_step_an_analysis_and_a_start_keep_to_the_memory(what: str):
    limit = 150_000_000
    context = multiprocessing.get_context(METHOD)
    context.set_forkserver_preload(PRELOADED)
    with context.Pool(1) as fresh:  # what other tests left behind does not count
        limited, without_limit = fresh.apply(peaks_of, (what, limit))
    assert limited < 1.2 * limit
    assert without_limit > 1.5 * limit  # null control


@pytest.mark.parametrize(("distance", "size"), [("kl", 1), ("mse", 1), ("mse", 10)])
@pytest.mark.parametrize("padding", ["none", "of positions", "of an example"])
def test_a_step_in_pieces_is_the_step_at_once(distance: Any, size: int, padding: str):
    """Also where distances are so large that their gradients are damped, by the distance of the whole batch."""
    torch.manual_seed(0)
    model, batch = tiny_llama(), {"input_ids": torch.randint(13, (6, 5))}
    if padding != "none":
        batch["attention_mask"] = torch.ones(6, 5, dtype=torch.long).index_fill_(1, torch.tensor([4]), 0)
        batch["attention_mask"][:2] = 1
        batch["attention_mask"][3] *= padding == "of positions"
    infos, factors = [], []
    for memory in (None, 4000):
        state = apd.init(
            model, weights="model.layers.1.*", n_components=4, rank=2, moves=None, memory=memory,
            losses=apd.Losses(distance=distance), selection=apd.TopK(1), optimization=apd.Optimization(scaled=False),
            attribution=apd.GradientAttribution(projections="exact"),
        )  # fmt: skip
        with torch.no_grad():
            for factor in state.components.parameters():
                factor *= size
        state, info = apd.step(state, batch)
        assert (info.terms["path"] > 1) == (size > 1) or distance == "kl"
        infos.append(torch.stack(list(info.terms.values())))
        factors.append([factor.grad for factor in state.components.parameters()])
    torch.testing.assert_close(*infos, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*factors, rtol=1e-3, atol=1e-6)
