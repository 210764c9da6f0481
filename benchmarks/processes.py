"""Trainings in several processes: what they give, what each process holds, and what becomes of them when one ends.

same      the largest difference of a factor from that of one process, float64, of the components whole in each process
          and divided over them. Beside it what one process gives with half of each batch, as if it were alone
memory    what a process holds of factors, gradients and Adam's moments, and its peak of memory over three steps
ends      trainings of two processes of which one is killed at a random moment, by SIGKILL and SIGTERM by turns: seconds
          until the other one says so, and the largest difference from a training that nobody ended after one or four
          processes went on. And one that is stopped by SIGSTOP, in a group with a timeout of 20 seconds
"""

import argparse
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed.tensor  # here, and not in each child
from kills import in_child
from torch import Tensor, nn

import apd_lens as apd
from apd_lens import _shards


def together(n: int, work: Callable[[], Any], timeout: float = 600.0) -> list[Any]:
    """What work() returns in each of n processes, or the error that it raises; None of one that ended."""
    with tempfile.TemporaryDirectory() as folder:
        for pid in started(n, work, Path(folder), timeout):
            os.waitpid(pid, 0)
        return found_in(Path(folder), n)


def started(n: int, work: Callable[[], Any], folder: Path, timeout: float) -> list[int]:
    def run(rank: int) -> Callable[[], None]:
        def in_group() -> None:
            limit = timedelta(seconds=timeout)
            store = f"file://{folder}/store"
            torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=n, timeout=limit)
            torch.distributed.barrier()
            (folder / f"began {rank}").touch()
            try:
                result = work()
            except BaseException as error:
                result = time.time(), str(error)
            torch.save(result, folder / f"unfinished {rank}")
            (folder / f"unfinished {rank}").rename(folder / str(rank))

        return in_group

    return [in_child(run(rank)) for rank in range(n)]


def found_in(folder: Path, n: int) -> list[Any]:
    files = [folder / str(rank) for rank in range(n)]
    return [torch.load(file) if file.exists() else None for file in files]


def some_data(step: int, seed: int, n: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + step)
    x = torch.rand(n, 12, generator=generator, dtype=torch.float64)
    return x * (torch.rand(n, 12, generator=generator) < 0.2)


def train(steps: int, seed: int = 0, share: float = 1.0, **options: Any) -> list[Tensor]:
    """The factors at the end."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 5), nn.Linear(5, 12), nn.ReLU()).double()
    decomposition = apd.decompose(
        model,
        lambda step: some_data(step, seed)[: int(64 * share)],
        **{"n_components": 14, "rank": 2, "moves": None, "seed": seed, "progress": False, **options},
        optimization=apd.Optimization(steps),
    )
    return [factor.detach() for factor in decomposition.components.whole().parameters()]


CASES: dict[str, dict[str, Any]] = {
    "batch top-k, k found": {},
    "top-k": {"selection": apd.TopK(2)},
    "Lp": {"selection": apd.Lp(0.9), "losses": apd.Losses(path=0.0)},
    "gates, attacked": {"masks": apd.Gates(hidden=16), "losses": apd.Losses(attack=0.5, completeness=1.0)},
    "two streams": {"others": lambda step: some_data(step, 77, 50)},
    "cluster moves": {"moves": apd.moves.ClusterMoves(every=10)},
    "split moves": {"moves": apd.moves.SplitMoves(every=10)},
}


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max((one - other).abs().max().item() for one, other in zip(ours, theirs, strict=True))


def same(steps: int, cases: list[str], seeds: list[int], counts: list[int]) -> None:
    columns = [f"{n}{sharded}" for n in counts for sharded in ("", ", divided")]
    print(f"| {steps} steps, seed | {' | '.join(columns)} | half of each batch |")
    for seed in seeds:
        for name in cases:
            options = CASES[name]

            def run(seed: int = seed, options: dict[str, Any] = options, **more: Any) -> list[Tensor]:
                return train(steps, seed, **options, **more)

            one = together(1, run)[0]
            cells = []
            for n in counts:
                for sharded in (False, True):
                    several = together(n, lambda sharded=sharded: run(sharded=sharded))
                    cells.append(f"{max(difference(of_each, one) for of_each in several):.0e}")
            cells.append(f"{difference(together(1, lambda: run(share=0.5))[0], one):.0e}")
            print(f"| {name}, {seed} | {' | '.join(cells)} |", flush=True)


def resident(of: str) -> int:
    """Bytes, now (VmRSS) or at most (VmHWM), on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(of))


def hold(n_components: int, width: int, sharded: bool) -> tuple[int, int]:
    """Bytes of factors, gradients and moments in this process behind three steps, and the peak over what was before."""
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(width, width, bias=False), nn.ReLU())]
    model = nn.Sequential(*layers)

    def steps(n_components: int) -> apd.training.State:
        options = {"n_components": n_components, "rank": 2, "selection": apd.TopK(4), "moves": None}
        state = apd.init(model, **options, attribution=apd.GradientAttribution(4), sharded=sharded)
        for step in range(3):
            state, _ = apd.step(state, torch.randn(32, width, generator=torch.Generator().manual_seed(step)))
        return state

    steps(8)  # what is loaded at first use is no concern of ours
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, state, held = resident("VmRSS"), steps(n_components), 0
    for factor in state.components.parameters():
        moments = [value for value in state.optimizer.state[factor].values() if value.ndim]
        held += sum(_shards.own_part(tensor).nbytes for tensor in (factor.detach(), factor.grad, *moments))
    return held, resident("VmHWM") - before


def memory(n_components: int, width: int, counts: list[int]) -> None:
    print(f"6 matrices {width} x {width}, {n_components} components of rank 2; MiB of a process")
    print("| processes | factors, gradients, moments | peak |", flush=True)
    for n in [1, *counts]:
        for sharded in (False, True) if n > 1 else (False,):
            found = together(n, lambda sharded=sharded: hold(n_components, width, sharded))
            held, peak = (max(of_each) / 2**20 for of_each in zip(*found, strict=True))
            print(f"| {n}{', divided' * sharded} | {held:.0f} | {peak:.0f} |", flush=True)


def ended(n_kills: int, seed: int, steps: int) -> None:
    draw, expected = random.Random(seed), together(1, lambda: train(steps))[0]
    start = time.perf_counter()
    together(2, lambda: train(steps))
    lasting = time.perf_counter() - start
    waited, differences, said, number = [], [], dict[str, int](), 0
    while len(waited) < n_kills:
        number += 1
        how = (signal.SIGKILL, signal.SIGTERM)[number % 2]
        with tempfile.TemporaryDirectory() as temporary:
            folder, sharded = Path(temporary), draw.random() < 0.5
            (folder / "group").mkdir()

            def run(folder: Path = folder, sharded: bool = sharded) -> list[Tensor]:
                checkpoint = apd.Checkpoint(folder / "run", every=5)
                return train(steps, sharded=sharded, checkpoint=checkpoint, resume=folder / "run")

            pids = started(2, run, folder / "group", 600)
            other = draw.randrange(2)
            while len(list((folder / "group").glob("began *"))) < 2:
                time.sleep(0.01)
            time.sleep(draw.uniform(0, lasting))
            at = time.time()
            os.kill(pids[1 - other], how)
            for pid in pids:
                os.waitpid(pid, 0)
            left = found_in(folder / "group", 2)[other]
            if not isinstance(left, tuple):
                continue  # it was done before
            waited.append(left[0] - at)
            said[left[1].split(" while ")[0]] = said.get(left[1].split(" while ")[0], 0) + 1
            differences += [difference(gone_on, expected) for gone_on in together(draw.choice([1, 4]), run)]
    print(f"one of two killed: {len(waited)}, the other one said so after {max(waited):.1f} s at most; gone on with by")
    print(f"1 or 4 processes the largest difference is {max(differences):.0e}. What was said:")
    for message, times in said.items():
        print(f"    {times:3} {message:.160}")


def stopped(steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pids = started(2, lambda: train(steps), Path(folder), 20)
        while len(list(Path(folder).glob("began *"))) < 2:
            time.sleep(0.01)
        time.sleep(1)
        at = time.time()
        os.kill(pids[1], signal.SIGSTOP)
        os.waitpid(pids[0], 0)
        seconds, message = found_in(Path(folder), 2)[0]
        os.kill(pids[1], signal.SIGKILL)
        os.waitpid(pids[1], 0)
    print(f"one of two stopped, timeout 20 s: the other one says after {seconds - at:.1f} s: {message:.300}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of each training that is compared; 0: none")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=[*CASES])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--processes", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--components", type=int, default=2000, help="of which memory is measured; 0: none")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--kills", type=int, default=20, help="of one of two processes; 0: none")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a process with threads of its own cannot be forked
    if arguments.steps:
        same(arguments.steps, arguments.cases, arguments.seeds, arguments.processes)
    if arguments.components:
        memory(arguments.components, arguments.width, arguments.processes)
    if arguments.kills:
        ended(arguments.kills, seed=0, steps=60)
        stopped(steps=2000)


if __name__ == "__main__":
    main()
