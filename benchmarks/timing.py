"""What the benchmarks share: medians of rounds, the machine's rates, and where results go."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

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
