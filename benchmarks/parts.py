"""Where the time of a training step goes, beside its floor.

Each part's floor is what the matrix products that it executes would take at the machine's measured rate, or what the
bytes that all its operations read and write would take at its measured bandwidth, whichever is more. Operations and
bytes are counted as they are dispatched, so the floor is that of the operations as we do them.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from timing import bandwidth, matmul_rate, save
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from training_step import CASES, Case

import apd_lens as apd
from apd_lens.attribution._effects import effects_of_calls
from apd_lens.attribution._over_outputs import sum_of_squares
from apd_lens.attribution._pullback import jacobians_in_parts
from apd_lens.losses._terms import weighted_sum
from apd_lens.masks import Masks
from apd_lens.passes._cotangents import one_hot_cotangents
from apd_lens.passes._watch import watched_pass
from apd_lens.training._step import stream_terms

_T = TypeVar("_T")


def flops_of_addbmm(weight: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    """Of shapes; as torch's formulas are called."""
    batch, rows, inner = a
    return 2 * batch * rows * inner * b[-1]


# What torch's counter has no formula for.
NOT_COUNTED = {torch.ops.aten.addbmm: flops_of_addbmm}


class ByteCounter(TorchDispatchMode):
    """Bytes of the tensors that each operation reads and writes; views and empty tensors take none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        read = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        written = [value for value in tree_leaves(output) if isinstance(value, Tensor)]
        memory = {value.untyped_storage().data_ptr() for value in read}
        is_view = any(value.untyped_storage().data_ptr() in memory for value in written) and not func._schema.is_mutable
        if not is_view and "empty" not in str(func):
            self.bytes += sum(value.numel() * value.element_size() for value in read + written)
        return output


class Meter:
    """Runs parts, and notes the time of each; or counts what it executes."""

    def __init__(self, counting: bool):
        self.counting = counting
        self.seconds: dict[str, float] = {}
        self.flops: dict[str, int] = {}
        self.bytes: dict[str, int] = {}

    def __call__(self, part: str, run: Callable[[], _T]) -> _T:
        start = time.perf_counter()
        if not self.counting:
            result = run()
        else:
            with FlopCounterMode(display=False, custom_mapping=NOT_COUNTED) as flops, ByteCounter() as traffic:
                result = run()
            self.flops[part] = self.flops.get(part, 0) + flops.get_total_flops()
            self.bytes[part] = self.bytes.get(part, 0) + traffic.bytes
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start
        return result


@dataclass(frozen=True)
class Given:
    """A masking whose masks are known."""

    known: Masks

    def masks(self, *args: Any) -> Masks:
        return self.known


def step_in_parts(state: apd.training.State, batch: Tensor, meter: Meter) -> None:
    """What `apd_lens.step` does with exact attributions, part by part."""
    components, settings = state.components, state.settings
    hidden = settings.losses.hidden_at
    watched = meter("target pass", lambda: watched_pass(state.target, components.names, batch, state.output, hidden))
    squares = []
    memory = settings.attribution.memory
    with torch.no_grad():
        parts = jacobians_in_parts(watched, one_hot_cotangents(watched.output), memory)
        while (found := meter("Jacobian", lambda: next(parts, None))) is not None:
            part, chunks = found
            total = 0.0
            while (jacobians := meter("Jacobian", lambda chunks=chunks: next(chunks, None))) is not None:

                def squared(jacobians=jacobians, part=part) -> Tensor:
                    effects = effects_of_calls(
                        jacobians, part.calls, components, settings.selection.granularity, memory
                    )
                    return torch.cat([sum_of_squares(some) for some in effects])

                total = total + meter("attribution", squared)
            squares.append(total)
    attributions = (torch.cat(squares) / watched.output.shape[1]).sqrt()
    mask = meter("selection", lambda: settings.selection(attributions, None))
    (stream,) = state.streams
    stream = replace(stream, masking=Given(Masks(attributions, mask, mask, int(mask.sum()))))
    terms, *_ = meter("sparse passes", lambda: stream_terms(state, stream, watched, 0.0, None))
    loss = weighted_sum(settings.losses, terms, 0.0)
    meter("backward of the rest", lambda: loss.backward(inputs=list(components.parameters())))
    meter("optimizer", state.optimizer.step)
    state.optimizer.zero_grad()


def measure(case: Case, rounds: int, rate: float, width: float) -> list[dict[str, float | str]]:
    state, batch = case.state(apd.GradientAttribution("exact")), case.batch()
    counter = Meter(counting=True)
    step_in_parts(state, batch, Meter(counting=False))
    step_in_parts(state, batch, counter)
    meters = [Meter(counting=False) for _ in range(rounds)]
    for meter in meters:
        step_in_parts(state, batch, meter)
    rows = []
    for part in counter.flops:
        taken = sorted(meter.seconds[part] for meter in meters)[rounds // 2]
        floor = max(counter.flops[part] / rate, counter.bytes[part] / width)
        rows.append({"part": part, "ms": 1000 * taken, "floor ms": 1000 * floor, "GFLOP": counter.flops[part] / 1e9,
                     "GB": counter.bytes[part] / 1e9})  # fmt: skip
    total = {name: sum(row[name] for row in rows) for name in ("ms", "floor ms", "GFLOP", "GB")}
    return [*rows, {"part": "step", **total}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    arguments = parser.parse_args()
    rate, width = matmul_rate(), bandwidth()
    print(f"{torch.get_num_threads()} threads: {rate / 1e9:.0f} GFLOP/s in matrix products, {width / 1e9:.0f} GB/s")
    results = {}
    for case in CASES:
        if arguments.only in str(case):
            results[str(case)] = measure(case, arguments.rounds, rate, width)
            print(f"\n{case!s:28}{'ms':>9}{'floor':>9}{'ratio':>8}{'GFLOP':>9}{'GB':>8}")
            for row in results[str(case)]:
                ratio = row["ms"] / row["floor ms"] if row["floor ms"] else float("nan")
                print(f"  {row['part']:26}{row['ms']:9.1f}{row['floor ms']:9.1f}{ratio:8.1f}{row['GFLOP']:9.2f}"
                      f"{row['GB']:8.2f}", flush=True)  # fmt: skip
    save("parts", {"flops": rate, "bytes": width, "cases": results})


if __name__ == "__main__":
    main()
