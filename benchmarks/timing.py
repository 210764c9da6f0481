"""What the benchmarks share: medians of rounds, peak memory, the machine's rates, and where results go."""

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import apd_lens as apd

OUT = Path("out/bench")


def seconds(run: Callable[[], object]) -> float:
    """Until a GPU, if there is one, is done too."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def median_seconds(run: Callable[[], object], rounds: int = 5) -> float:
    """After one run that does not count."""
    run()
    return statistics.median(seconds(run) for _ in range(rounds))


def peak_bytes(make: Callable[[], Callable[[], object]]) -> int:
    """Of two runs of what `make` makes, in a fresh process, above what that held before them. It took a step of a tiny
    model before, so that the code which that loads does not count."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_bytes, (make, torch.get_num_threads()))


def _peak_bytes(make: Callable[[], Callable[[], object]], threads: int) -> int:
    torch.set_num_threads(threads)
    tiny = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    apd.step(apd.init(tiny, n_components=4), torch.randn(16, 8))
    run = make()
    before = _resident("VmRSS")
    run(), run()
    return _resident("VmHWM") - before


def _resident(which: str) -> int:
    """Bytes of this process in memory, now ("VmRSS") or at most ("VmHWM")."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which)]
    return int(line.split()[1]) * 1024


def matmul_rate() -> float:
    """Floating-point operations a second of one large matrix product in float32."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    return 2 * 2048**3 / median_seconds(lambda: a @ b)


def bandwidth() -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    a, b = torch.randn(2**26), torch.empty(2**26)
    return 2 * 4 * 2**26 / median_seconds(lambda: b.copy_(a))


def save(name: str, results: Any) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "results": results}
    (OUT / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n")
