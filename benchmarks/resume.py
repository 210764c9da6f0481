"""Trainings that are saved and gone on with: what saving costs, and what becomes of trainings that are killed.

cost      the share of a training's time that its checkpoints take: of a toy, of a residual MLP, and of a language
          model with others, for several `every`
kills     trainings that are ended by SIGKILL or SIGTERM at a random moment, and gone on with to their end. Wrong: the
          end has other bits than that of one that nobody ended
saves     trainings that are killed before each line of what saves a checkpoint. Wrong: the checkpoint before is lost
          and the new one is not there; the training does not go on to the same bits; or something is left behind
"""

import argparse
import itertools
import os
import random
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from kills import in_child, killed_at_line
from torch import Tensor, nn

import apd_lens as apd
from apd_lens import _files
from apd_lens.decomposition import _artifact
from apd_lens.training import _checkpoint

STEPS = 60


def batch(step: int, n: int = 16) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(step))


def listed() -> dict[str, Any]:
    """A list that comes again, k that the training finds, and moves."""
    moves = apd.moves.ClusterMoves(every=5)
    return {"batches": [batch(step) for step in range(5)], "moves": moves, "optimization": apd.Optimization(STEPS)}


def targeted() -> dict[str, Any]:
    """Two streams, one of a loader that shuffles by a seed, and a fitted start."""
    loader = torch.utils.data.DataLoader(
        batch(0, 64), batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(0)
    )
    optimization = apd.Optimization(STEPS, start="data", unit_norm=True)
    return {"batches": loader, "others": batch, "moves": None, "optimization": optimization}


CASES = {"a list, with moves": listed, "two streams, fitted": targeted}


def train(make: Callable[[], dict[str, Any]], folder: Path | None = None, every: int = 7) -> list[Tensor]:
    """The factors at the end; saved in a folder, and gone on with from there."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    options = make()
    durable = {} if folder is None else {"checkpoint": apd.Checkpoint(folder, every), "resume": folder}
    decomposition = apd.decompose(
        model, options.pop("batches"), n_components=5, rank=2, progress=False, **options, **durable
    )
    return [factor.detach() for factor in decomposition.components.parameters()]


def newest(folder: Path) -> int:
    """The step of the newest checkpoint that is whole."""
    for file in _checkpoint.checkpoints_at(folder, apd.Checkpoint(folder)):
        if _artifact.read_tensors(file, 2**30)[2]:
            return int(file.stem.removeprefix("step-"))
    return 0


def child(make: Callable[[], dict[str, Any]], folder: Path, every: int) -> Callable[[], None]:
    """Trains, and writes the factors when it is done."""

    def run() -> None:
        factors = train(make, folder / "run", every)
        content = safetensors.torch.save({str(number): factor for number, factor in enumerate(factors)})
        _files.write_file(folder / "end", content)

    return run


def same(folder: Path, expected: list[Tensor]) -> bool:
    came = safetensors.torch.load((folder / "end").read_bytes())
    return all(torch.equal(came[str(number)], factor) for number, factor in enumerate(expected))


def kills(wanted: int, seed: int = 0) -> dict[str, tuple[int, int]]:
    """For each case and signal: trainings that were killed at a random moment, and those that went wrong then."""
    draw, found = random.Random(seed), {}
    for (name, make), how in itertools.product(CASES.items(), (signal.SIGKILL, signal.SIGTERM)):
        taken: list[float] = []
        expected, *_ = (timed(train, taken)(make) for _ in range(3))
        n_kills = n_wrong = 0
        while n_kills < wanted:
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                pid = in_child(child(make, folder, draw.choice([1, 3, 7])))
                time.sleep(draw.uniform(0, min(taken)))
                os.kill(pid, how)
                os.waitpid(pid, 0)
                if (folder / "end").exists():
                    continue
                n_kills += 1
                os.waitpid(in_child(child(make, folder, 7)), 0)
                n_wrong += not same(folder, expected)
        found[f"{name}, {how.name}"] = n_kills, n_wrong
    return found


def saves(every_line: int = 1, seed: int = 0) -> tuple[int, int]:
    """Trainings that were killed while a checkpoint was written, and those that went wrong."""
    draw, n_kills, n_wrong = random.Random(seed), 0, 0
    files = {_artifact.__file__, _files.__file__, _checkpoint.__file__}
    expected = train(listed)
    with tempfile.TemporaryDirectory() as temporary:
        begun = Path(temporary) / "begun"
        train(listed, begun, 1)
        before = STEPS - 1
        (begun / f"step-{STEPS:06}.safetensors").unlink()
        line, ended = 1, False
        while not ended:
            folder = Path(temporary) / str(line)
            shutil.copytree(begun, folder / "run")
            run = killed_at_line(line, child(listed, folder, 1), draw.choice([signal.SIGKILL, signal.SIGTERM]), files)
            pid = in_child(run)
            os.waitpid(pid, 0)
            ended = (folder / "end").exists()
            n_kills += not ended
            n_wrong += newest(folder / "run") < before
            if not ended:
                os.waitpid(in_child(child(listed, folder, 1)), 0)
            is_clean = len(os.listdir(folder / "run")) <= 2 and len(os.listdir(folder)) == 2
            n_wrong += not (same(folder, expected) and is_clean)
            shutil.rmtree(folder)
            line += every_line
    return n_kills, n_wrong


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*arguments)
        finally:
            seconds.append(time.perf_counter() - start)

    return run


def systems(quick: bool) -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """Name -> model, and arguments of a training."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def data(d: int) -> Callable[[int], Tensor]:
        return lambda step: torch.rand(512, d, generator=torch.Generator().manual_seed(step))

    width = 64 if quick else 576
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=1000, num_hidden_layers=2 if quick else 12, **sizes)).eval()
    last = f"model.layers.{llama.config.num_hidden_layers - 1}.self_attn.[vo]_proj*"
    texts = [torch.randint(1000, (20, 16), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    return {
        "40 → 10 → 40, 60 components": (
            nn.Sequential(nn.Linear(40, 10), nn.Linear(10, 40), nn.ReLU()),
            {"batches": data(40), "n_components": 60},
        ),
        "100 → 500 → 100, 100 components": (
            nn.Sequential(nn.Linear(100, 500), nn.ReLU(), nn.Linear(500, 100)),
            {"batches": data(100), "n_components": 100},
        ),
        f"Llama of width {width}, 47 components, others": (
            llama,
            {"batches": texts[:2], "others": texts[2:], "weights": last, "n_components": 47}
            | {key: value for key, value in apd.language_model().items() if key != "optimization"},
        ),
    }


def cost(steps: int, everys: list[int], quick: bool) -> None:
    """Ten checkpoints are saved; medians say how much longer a training with one every so many steps takes."""
    for name, (model, options) in systems(quick).items():
        spent: dict[str, list[float]] = {"save_if_due": [], "_save": []}
        original = {method: getattr(_checkpoint.Run, method) for method in spent}
        for method, seconds in spent.items():
            setattr(_checkpoint.Run, method, timed(original[method], seconds))
        at: list[float] = []
        some = dict(options)
        with tempfile.TemporaryDirectory() as folder:
            apd.decompose(
                model,
                some.pop("batches"),
                **some,
                optimization=apd.Optimization(steps),
                progress=False,
                checkpoint=apd.Checkpoint(folder, steps // 10),
                on_step=lambda step, info, at=at: at.append(time.perf_counter()),
            )
            n_bytes = max(file.stat().st_size for file in Path(folder).iterdir())
        for method, function in original.items():
            setattr(_checkpoint.Run, method, function)
        one_step = statistics.median(after - before for before, after in itertools.pairwise(at))
        one_save = statistics.median(spent["_save"])
        always = statistics.median(spent["save_if_due"])  # most of the time nothing is saved
        shares = [f"{100 * (always + one_save / every) / one_step:.2f} % every {every} steps" for every in everys]
        print(
            f"{name}: a step {1000 * one_step:.1f} ms, a checkpoint of {n_bytes / 2**20:.1f} MiB "
            f"{1000 * one_save:.0f} ms: {', '.join(shares)}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of each training whose cost is measured; 0 for none")
    parser.add_argument("--every", type=int, nargs="*", default=[500, 100])
    parser.add_argument("--kills", type=int, default=20, help="of each case, by each signal")
    parser.add_argument(
        "--lines", type=int, default=1, help="kill before each line of a save, or each so many; 0: none"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a small language model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a process with threads of its own cannot be forked
    if arguments.kills:
        for name, (n_kills, n_wrong) in kills(arguments.kills, arguments.seed).items():
            print(f"{name}: {n_kills} killed and gone on with, wrong: {n_wrong}", flush=True)
    if arguments.lines:
        n_kills, n_wrong = saves(arguments.lines, arguments.seed)
        print(f"killed while a checkpoint was written: {n_kills}, wrong: {n_wrong}", flush=True)
    if arguments.steps:
        cost(arguments.steps, arguments.every, arguments.quick)


if __name__ == "__main__":
    main()
