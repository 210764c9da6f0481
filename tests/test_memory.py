import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
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


def language_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return tiny_llama(vocab_size=8192, hidden_size=64, intermediate_size=128, max_position_embeddings=64)


def peak(run: Callable[[], object]) -> int:
    """Bytes that a run takes at most beside what was there before it."""

    def resident(which: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(which))

    gc.collect()
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-3, 2**18)  # M_MMAP_THRESHOLD: larger blocks go back at once, whatever was freed before
    libc.malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    run()
    return resident("VmHWM") - before


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks are read from Linux's /proc")
@pytest.mark.parametrize("what", ["step", "analysis"])
def test_a_step_and_an_analysis_keep_to_the_memory(what: str):
    model, limit = language_model(), 150_000_000
    settings = {"n_components": 16, "rank": 1, "moves": None, "losses": apd.Losses(distance="kl")}
    settings |= {"weights": "model.layers.1.*", "selection": apd.TopK(2, "position")}

    def run(batch: torch.Tensor, memory: int | None) -> Callable[[], object]:
        state = apd.init(model, memory=memory, **settings)
        if what == "step":
            return lambda: apd.step(state, batch)
        decomposition = state.decomposition()

        def analyse() -> None:
            with apd.memory(memory):
                decomposition.attributions(batch)

        return analyse

    small, large = torch.randint(8192, (2, 8)), torch.randint(8192, (32, 64))  # its logits take 67 MB
    run(small, None)(), run(small, limit)()  # what torch loads does not count
    assert peak(run(large, limit)) < 1.2 * limit
    assert peak(run(large, None)) > 1.5 * limit  # null control


@pytest.mark.parametrize("distance", ["kl", "mse"])
@pytest.mark.parametrize("padding", ["none", "of positions", "of an example"])
def test_a_step_in_pieces_is_the_step_at_once(distance: Any, padding: str):
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
        state, info = apd.step(state, batch)
        infos.append(torch.stack(list(info.terms.values())))
        factors.append([factor.grad for factor in state.components.parameters()])
    torch.testing.assert_close(*infos, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*factors, rtol=1e-3, atol=1e-6)
