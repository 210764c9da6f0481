"""Systems whose mechanisms are known and that nobody tuned for, each decomposed with one set of defaults.

A form is what `apd.decompose` is given beside model, data, weights and the number of components, and it is the same for
every system. Each run leaves a JSON in results/; runs that are already there are skipped, so it can be stopped and
started again. Then the table in README.md is made anew from what is there.

    python examples/truths/truths.py                                      # all systems, the defaults
    python examples/truths/truths.py --forms lp --systems cipher-64 --seeds 0 1
"""

import argparse
import itertools
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import judges
import torch
from judges import Numbers, Owners
from torch import Tensor

import apd_lens as apd
from apd_lens import toys

HERE = Path(__file__).parent
README = """# Truths that nobody tuned for

Made by `make truths`. Every system is decomposed with the same settings, those of the form; only the number of
components is chosen for a system. Targets and data come from the seed. Beside each number stand the same number of

- random components with the same singular values in every matrix,
- usage-matched ones: for each mechanism's component another one that is about as often active,
- an untrained target (seed 0 alone), decomposed in the same way.

Numbers are the smallest to the largest over seeds.
"""

# What is given beside model, data, weights and n_components; nothing else is set, on any system.
FORMS: dict[str, dict[str, Any]] = {
    "topk": {},
    "lp": {"selection": apd.Lp(), "losses": apd.Losses(path=0), "moves": None},
}


@dataclass(frozen=True)
class System:
    """A system and its judge.

    Attributes:
        make: seed=, and steps= of its training (0: untrained) -> target, with a `model` and the `weights` to decompose.
        batches: target, seed -> what `apd.decompose` is given.
        owners: target, decomposition -> the component of each mechanism.
        measure: target, decomposition, owners -> numbers.
        met: whether the numbers meet the goal.
        output: of the model's return value; None where the default is meant.
    """

    title: str
    make: Callable[..., Any]
    batches: Callable[[Any, int], Any]
    n_components: int
    owners: Callable[[Any, apd.Decomposition], Owners]
    measure: Callable[[Any, apd.Decomposition, Owners], Numbers]
    met: Callable[[Numbers], bool]
    goal: str
    output: Callable[[Tensor], Tensor] | None = None


SYSTEMS = {
    "cipher-64": System(
        "redundancy, width 64",
        partial(toys.train_cipher, 64, 48),
        lambda target, seed: [target.tokens],
        48,
        judges.cipher_owners,
        judges.measure_cipher,
        judges.cipher_is_apart,
        goal="32 components that span all blocks; own token forgotten ≥ 0.95, others ≤ 0.01",
    ),
    "cipher-64-subsets": System(
        "redundancy, width 64, subsets of blocks in the data",
        partial(toys.train_cipher, 64, 48),
        lambda target, seed: [target.data()],
        48,
        judges.cipher_owners,
        judges.measure_cipher,
        judges.cipher_is_complete,
        goal="the same; and own forgotten ≥ 0.95 in every subset, 0 of 96 mechanisms skipped, none shattered",
    ),
    "cipher-16": System(
        "redundancy, width 16",
        partial(toys.train_cipher, 16, 24),
        lambda target, seed: [target.tokens],
        48,
        judges.cipher_owners,
        judges.measure_cipher,
        judges.cipher_in_superposition,
        goal="≥ 30 of 32 with a component of their own, sparse accuracy ≥ 0.98",
    ),
}


def decompose(system: System, target: Any, form: str, seed: int, steps: int | None) -> apd.Decomposition:
    given = dict(FORMS[form])
    if system.output is not None:
        given["output"] = system.output
    if steps is not None:
        given["optimization"] = replace(given.get("optimization", apd.Optimization()), steps=steps)
    batches = system.batches(target, seed)
    return apd.decompose(
        target.model, batches, target.weights, n_components=system.n_components, seed=seed, progress=False, **given
    )


def run(name: str, form: str, seed: int, steps: int | None, target_steps: int | None) -> dict[str, Any]:
    """One target: trained, decomposed, judged, beside its nulls."""
    system = SYSTEMS[name]
    given = {} if target_steps is None else {"steps": target_steps}
    start = time.perf_counter()
    target = system.make(seed=seed, **given)
    target_seconds, start = time.perf_counter() - start, time.perf_counter()
    decomposition = decompose(system, target, form, seed, steps)
    seconds = time.perf_counter() - start
    owners = system.owners(target, decomposition)
    random = replace(decomposition, components=apd.random_components(decomposition.components))
    batches = system.batches(target, seed)
    mask = judges.active(decomposition, batches(-1) if callable(batches) else batches[0])
    numbers = {**system.measure(target, decomposition, owners), "residual": decomposition.residuals()["all"]}
    nulls = {
        "random": system.measure(target, random, system.owners(target, random)),
        "usage-matched": system.measure(target, decomposition, judges.usage_matched(owners, mask)),
    }
    if seed == 0:
        untrained = system.make(seed=seed, steps=0)
        of_untrained = decompose(system, untrained, form, seed, steps)
        nulls["untrained"] = system.measure(untrained, of_untrained, system.owners(untrained, of_untrained))
    return {
        "system": name,
        "form": form,
        "seed": seed,
        "met": system.met(numbers),
        "numbers": numbers,
        "nulls": nulls,
        "target_loss": target.loss,
        "target_seconds": round(target_seconds, 1),
        "seconds": round(seconds, 1),
        "hardware": hardware(),
    }


def hardware() -> dict[str, Any]:
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "busy": round(os.getloadavg()[0], 1),
    }


def results(folder: Path, name: str, form: str) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob(f"{name}.{form}.*.json"))]


def table(folder: Path) -> str:
    """One part a system, in Markdown: a row for each number, a column for each form and its nulls."""
    parts = []
    for name, system in SYSTEMS.items():
        by_form = {form: runs for form in FORMS if (runs := results(folder, name, form))}
        if not by_form:
            continue
        parts.append(f"## {system.title}\n\nGoal: {system.goal}.\n")
        for form, runs in by_form.items():
            seeds, met = ", ".join(str(run["seed"]) for run in runs), sum(run["met"] for run in runs)
            seconds = spread([run["seconds"] for run in runs])
            parts.append(f"`{form}` meets it on {met} of {len(runs)} targets (seeds {seeds}); {seconds} s each.\n")
            parts += [*rows(runs), ""]
    return "\n".join(parts)


def rows(runs: list[dict[str, Any]]) -> list[str]:
    nulls = list(dict.fromkeys(null for run in runs for null in run["nulls"]))
    lines = ["| " + " | ".join(["", "components", *nulls]) + " |", "| --- " * (2 + len(nulls)) + "|"]
    for what in runs[0]["numbers"]:
        of_nulls = [[run["nulls"][null][what] for run in runs if what in run["nulls"].get(null, {})] for null in nulls]
        cells = [spread(values) for values in ([run["numbers"][what] for run in runs], *of_nulls)]
        lines.append("| " + " | ".join([what, *cells]) + " |")
    return lines


def spread(values: list[float]) -> str:
    if not values:
        return ""
    low, high = (f"{value:.3g}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["topk"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="training steps of a decomposition, by default those of the form")
    parser.add_argument("--target-steps", type=int, help="training steps of the targets, by default the target's own")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    for name, form, seed in itertools.product(arguments.systems, arguments.forms, arguments.seeds):
        file = arguments.results / f"{name}.{form}.{seed}.json"
        if file.exists():
            continue
        result = run(name, form, seed, arguments.steps, arguments.target_steps)
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(result, indent=1))
        unfinished.replace(file)
        met = "meets the goal" if result["met"] else "does not meet the goal"
        shown = "; ".join(f"{what} {value:.4g}" for what, value in result["numbers"].items())
        print(f"{name} {form} seed {seed} {met}: {shown}; {result['seconds']} s", flush=True)
    summary = table(arguments.results)
    print(f"\n{summary}")
    if arguments.results == HERE / "results":
        (HERE / "README.md").write_text(f"{README}\n{summary}")


if __name__ == "__main__":
    main()
