"""How wide the valley is: the share of seeds that meet the goal where one coefficient at a time is another.

All seeds of a cell run on one target. Each cell leaves a JSON, and those that are there
are skipped. The seeds of the cell in the middle are compared with each other as well (`metrics.stability`).
"""

import argparse
import json
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import drawing
import paper
import torch

import apd_lens as apd
from apd_lens import metrics, plots

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
COEFFICIENTS = ("faithfulness", "minimality", "path", "simplicity")


def with_factor(losses: apd.Losses, coefficient: str, factor: float) -> apd.Losses:
    value = getattr(losses, coefficient)
    if isinstance(value, apd.HoldThenDecay):
        return replace(losses, **{coefficient: replace(value, value=factor * value.value)})
    return replace(losses, **{coefficient: factor * value})


@cache
def make_target(name: str) -> paper.Target:
    """One for all cells."""
    return paper.make_target(name, 0, None)


def run(name: str, coefficient: str, factor: float, n_seeds: int, steps: int | None) -> dict[str, Any]:
    """One cell of the grid: how many of the seeds meet the goal, and their numbers."""
    system, start = paper.SYSTEMS[name], time.perf_counter()
    target = make_target(name)
    decompositions = [
        apd.decompose(
            target.model,
            target.batches(system.batch_size, seed=1000),
            target.weights,
            seed=seed,
            progress=False,
            **paper.settings(system, with_factor(system.losses, coefficient, factor), steps),
        )
        for seed in range(n_seeds)
    ]
    numbers = [system.measure(target, decomposition) for decomposition in decompositions]
    cell = {
        "system": name,
        "coefficient": coefficient,
        "factor": factor,
        "success": sum(map(system.succeeded, numbers)) / n_seeds,
        "numbers": numbers,
        "seconds": round(time.perf_counter() - start, 1),
        "hardware": paper.hardware(),
    }
    if factor == 1:
        x = target.batches(2048, seed=10**6)(0)
        alive = [each.select(x).any(0) for each in decompositions]
        stability = metrics.stability(decompositions, alive=alive)
        cell["stability"] = {"whole": stability.whole.tolist(), "null": stability.whole_null.mean(0).tolist()}
    return cell


def cell_file(folder: Path, name: str, coefficient: str, factor: float) -> Path:
    """With all coefficients as they are, there is one cell for all."""
    return folder / f"{name}-valley-{'none' if factor == 1 else f'{coefficient}-{factor:g}'}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--system", choices=paper.SYSTEMS, default="tms-5-2")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--steps", type=int, help="training steps, by default 2000")
    parser.add_argument("--results", type=Path, default=paper.HERE / "results")
    parser.add_argument("--figures", type=Path, default=paper.HERE / "figures")
    arguments = parser.parse_args()
    for folder in (arguments.results, arguments.figures):
        folder.mkdir(parents=True, exist_ok=True)
    success = torch.zeros(len(COEFFICIENTS), len(FACTORS))
    print(f"{'share of seeds':16}" + "".join(f"{f'× {factor:g}':>8}" for factor in FACTORS))
    for row, coefficient in enumerate(COEFFICIENTS):
        for column, factor in enumerate(FACTORS):
            file = cell_file(arguments.results, arguments.system, coefficient, factor)
            if not file.exists():
                cell = run(arguments.system, coefficient, factor, arguments.seeds, arguments.steps)
                file.write_text(json.dumps(cell, indent=1))
            success[row, column] = json.loads(file.read_text())["success"]
        print(f"{coefficient:16}" + "".join(f"{share:8.2f}" for share in success[row].tolist()), flush=True)

    middle = json.loads(cell_file(arguments.results, arguments.system, "", 1.0).read_text())["stability"]
    whole, null = torch.tensor(middle["whole"]), torch.tensor(middle["null"])
    between = whole[~torch.eye(len(whole), dtype=torch.bool)]
    print(f"best cosine between seeds {between.mean():.4f}, lowest {between.min():.4f}, random {null.mean():.4f}")
    figures = {
        "valley": drawing.coefficient_valley(FACTORS, success, COEFFICIENTS),
        "stability": plots.seed_stability(whole[None], null[None], names=["all matrices"]),
    }
    for what, figure in figures.items():
        figure.savefig(arguments.figures / f"{arguments.system}-{what}.png", dpi=80)


if __name__ == "__main__":
    main()
