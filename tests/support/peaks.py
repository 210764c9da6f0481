"""How much memory a step, an analysis and a start that is fitted take at most."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch
from support.toy_models import tiny_llama

import apd_lens as apd


def peaks_of(what: str, limit: int) -> tuple[int, int]:
    """Of a step, an analysis or a start on 32 texts, with the limit and without one."""
    torch.manual_seed(0)
    model = tiny_llama(vocab_size=8192, hidden_size=64, intermediate_size=128, max_position_embeddings=64)
    settings = {"n_components": 16, "rank": 1, "moves": None, "losses": apd.Losses(distance="kl")}
    settings |= {"weights": "model.layers.1.*", "selection": apd.TopK(2, "position")}

    def run(batch: torch.Tensor, memory: int | None) -> Callable[[], object]:
        if what == "start":
            return lambda: apd.init(model, memory=memory, batches=[batch], **settings)
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
    return peak(run(large, limit)), peak(run(large, None))


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
