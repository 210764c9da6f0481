"""Several seeds as one computation beside as many single runs: seconds, and that the results agree.

The toy models of superposition with the settings of examples/paper. Both ways take the same steps on the same batches
in turn, round by round; the ratio is the median over rounds. "Differ by" is the largest difference of a component's
entry after the first round, over the largest entry of the target's matrix.
"""

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from timing import save, seconds
from torch import Tensor

import apd_lens as apd
from apd_lens import toys
from apd_lens._seeds import SeedsState, init_seeds, step_seeds

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "paper"))

import paper


@dataclass(eq=False)
class Runs:
    """The same seeds, each alone and all together; both go on where they are."""

    alone: list[apd.State]
    together: SeedsState

    def step_alone(self, batches: list[Tensor]) -> None:
        for index in range(len(self.alone)):
            for batch in batches:
                self.alone[index], _ = apd.step(self.alone[index], batch)

    def step_together(self, batches: list[Tensor]) -> None:
        for batch in batches:
            self.together, _ = step_seeds(self.together, batch)

    def difference(self) -> float:
        name, apart = "linear1.weight", []
        for one, same in zip(self.alone, self.together.singles, strict=True):
            apart.append(one.components.component_weights(name) - same.components.component_weights(name))
        return (torch.stack(apart).abs().max() / self.alone[0].weights[name].abs().max()).item()


SYSTEMS = {"TMS 5-2": (paper.SYSTEMS["tms-5-2"], 5, 2), "TMS 40-10": (paper.SYSTEMS["tms-40-10"], 40, 10)}


def make_runs(name: str, n_seeds: int, batch_size: int) -> tuple[Runs, list[Tensor]]:
    """With a target of random weights, since the time does not depend on them, and ten batches."""
    system, n_features, d_hidden = SYSTEMS[name]
    torch.manual_seed(0)
    model = toys.TMS(n_features, d_hidden).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    batches = [toys.tms_data(batch_size, generator, n_features=n_features) for _ in range(10)]

    def states() -> list[apd.State]:
        return [
            apd.init(model, weights="linear1.weight", **paper.settings(system), seed=seed) for seed in range(n_seeds)
        ]

    return Runs(states(), init_seeds(states())), batches


def measure(name: str, n_seeds: int, batch_size: int, rounds: int, steps: int) -> dict[str, float]:
    runs, some = make_runs(name, n_seeds, batch_size)
    batches = [some[step % len(some)] for step in range(steps)]
    runs.step_alone(batches[:10]), runs.step_together(batches[:10])
    difference, alone, together = runs.difference(), [], []
    for _ in range(rounds):
        alone.append(seconds(lambda: runs.step_alone(batches)))
        together.append(seconds(lambda: runs.step_together(batches)))
    return {
        "alone ms": 1000 * statistics.median(alone) / steps,
        "together ms": 1000 * statistics.median(together) / steps,
        "times faster": statistics.median(one / all_ for one, all_ in zip(alone, together, strict=True)),
        "differ by": difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100, help="of each seed and round")
    parser.add_argument("--seeds", type=int, nargs="*", default=[2, 8, 32])
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--only", default="", help="systems whose name holds this")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; a step of all seeds, medians of "
          f"{arguments.rounds} rounds of {arguments.steps} steps, batch {arguments.batch}")  # fmt: skip
    print(f"{'':22}{'one by one':>14}{'together':>14}{'faster':>9}{'differ by':>11}")
    results = {}
    for name in SYSTEMS:
        for n_seeds in arguments.seeds:
            if arguments.only in name:
                row = measure(name, n_seeds, arguments.batch, arguments.rounds, arguments.steps)
                label = f"{name}, {n_seeds} seeds"
                results[label] = row
                print(f"{label:22}{row['alone ms']:11.1f} ms{row['together ms']:11.1f} ms{row['times faster']:9.2f}"
                      f"{row['differ by']:11.0e}", flush=True)  # fmt: skip
    save("seeds", results)


if __name__ == "__main__":
    main()
