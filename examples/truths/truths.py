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


def centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(-1, keepdim=True)


README = """# Truths that nobody tuned for

Made by `make truths`. Every system is decomposed with the same settings, those of the form; only the number of
components is chosen for a system. Targets and data come from the seed. Beside each number stand the same number of

- random components with the same singular values in every matrix,
- usage-matched ones: for each mechanism's component another one that is about as often active,
- an untrained target, decomposed in the same way (for a compiled program: random matrices of the same singular values),
- for some systems, what needs no decomposition: single neurons, whole matrices.

Numbers are the smallest to the largest over seeds. `judges.py` says what they mean.

The start was chosen on seed 0 of all but induction. `facts` and `gates-untrained` were run before relative losses
became means over matrices, and not again; `facts` draws its factors.
"""

# What is given beside model, data, weights and n_components; nothing else is set, on any system.
FORMS: dict[str, dict[str, Any]] = {
    "topk": {},
    "complete": {"losses": apd.Losses(completeness=1)},
    # Told that one component is active on each data point.
    "one-complete": {"selection": apd.TopK(1), "losses": apd.Losses(completeness=1)},
    # What the examples take for facts, of which one is active on each data point; here all systems are told so.
    "facts": {name: toys.facts_settings()[name] for name in ("selection", "losses", "moves", "optimization")},
    "lp": {"selection": apd.Lp(), "losses": apd.Losses(path=0), "moves": None},
    "gates": {"masks": apd.Gates(), "losses": apd.Losses(completeness=1)},
    # A null of the gates: their network stays as it was drawn.
    "gates-untrained": {"masks": apd.Gates(lr=1e-12), "losses": apd.Losses(completeness=1)},
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
        baseline: what it is called, and target -> numbers of what is there without a decomposition.
    """

    title: str
    make: Callable[..., Any]
    batches: Callable[[Any, int], Any]
    n_components: int
    owners: Callable[[Any, apd.Decomposition], Owners | None]
    measure: Callable[[Any, apd.Decomposition, Any], Numbers]
    met: Callable[[Numbers], bool]
    goal: str
    output: Callable[[Tensor], Tensor] | None = None
    baseline: tuple[str, Callable[[Any], Numbers]] | None = None


def make_program(name: str, seed: int, steps: int | None = None) -> toys.ProgramTarget:
    """A compiled program; of 0 steps one with random matrices of the same singular values in the place of its own."""
    target = toys.compile_program(name, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in target.model.parameters() if steps == 0 else ():
        turns = (torch.linalg.qr(torch.randn(n, n, generator=generator))[0] for n in parameter.shape)
        parameter.data = next(turns) @ parameter @ next(turns)
    return target


def program(name: str) -> System:
    return System(
        f"compiled program, {name}",
        partial(make_program, name),
        lambda target, seed: target.batches(seed=1000 + seed),
        12,
        lambda target, decomposition: None,
        judges.measure_program,
        lambda numbers: numbers["found"] == numbers["of"] and numbers["sparse accuracy"] >= 0.99,
        goal="AUROC ≥ 0.95 for every node; sparse accuracy ≥ 0.99",
        baseline=("whole matrices", judges.matrices_of_program),
    )


def cipher(
    title: str, sizes: tuple[int, int], met: Callable[[Numbers], bool], goal: str, with_subsets: bool = False
) -> System:
    """Of some width and number of neurons; the data are all tokens, or each of them with every subset of blocks."""
    return System(
        f"redundancy, {title}",
        partial(toys.train_cipher, *sizes),
        lambda target, seed: [target.data() if with_subsets else target.tokens],
        48,
        judges.cipher_owners,
        judges.measure_cipher,
        met,
        goal,
    )


SYSTEMS = {
    "cipher-64": cipher(
        "width 64",
        (64, 48),
        judges.cipher_is_apart,
        "32 components that span all blocks; own token forgotten ≥ 0.95, others ≤ 0.01",
    ),
    "cipher-64-subsets": cipher(
        "width 64, subsets of blocks in the data",
        (64, 48),
        judges.cipher_is_complete,
        "the same; and own forgotten ≥ 0.95 in every subset, 0 of 96 mechanisms skipped, none shattered",
        with_subsets=True,
    ),
    "cipher-16": cipher(
        "width 16",
        (16, 24),
        judges.cipher_in_superposition,
        "≥ 30 of 32 with a component of their own, sparse accuracy ≥ 0.98",
    ),
    "boolean": System(
        "Boolean circuit, 16 gates in 20 neurons",
        toys.train_boolean,
        lambda target, seed: target.batches(512, seed=1000 + seed),
        24,
        judges.boolean_owners,
        judges.measure_boolean,
        lambda numbers: numbers["found"] >= 15,
        goal="≥ 15 of 16 gates in a component of their own",
    ),
    "addition": System(
        "addition modulo 47",
        toys.train_addition,
        lambda target, seed: target.batches(seed=1000 + seed),
        16,
        judges.addition_owners,
        judges.measure_addition,
        lambda numbers: numbers["found"] == numbers["of"],
        goal="a component for each key frequency, alignment ≥ 0.9",
        baseline=("single neurons", judges.neurons_of_addition),
    ),
    "induction": System(
        "induction transformer",
        toys.train_induction,
        lambda target, seed: lambda step: toys.sequences(24, seed=10**5 * seed + step).tokens,
        60,
        lambda target, decomposition: None,
        judges.measure_induction,
        lambda numbers: numbers["weight in the two heads"] >= 0.9 and numbers["right logit, attacked"] >= 0.7,
        goal="≥ 0.9 of the weight in the two heads; ≥ 0.7 of the right logit comes back, attacked",
        output=centred,
    ),
    **{f"program-{name}": program(name) for name in toys.PROGRAMS},
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
    numbers = {**system.measure(target, decomposition, owners), "residual": decomposition.residuals()["all"]}
    nulls = {}
    if target_steps != 0:
        random = replace(decomposition, components=apd.components.random_components(decomposition.components))
        nulls["random"] = system.measure(target, random, system.owners(target, random))
        if owners is not None:
            batches = system.batches(target, seed)
            mask = judges.active(decomposition, batches(-1) if callable(batches) else batches[0])
            nulls["usage-matched"] = system.measure(target, decomposition, judges.usage_matched(owners, mask))
        if system.baseline is not None:
            nulls[system.baseline[0]] = system.baseline[1](target)
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


def results(folder: Path, name: str, form: str, kind: str = "") -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob(f"{name}.{form}.{kind}[0-9]*.json"))]


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
            parts += [*rows(runs, results(folder, name, form, "untrained-")), ""]
    return "\n".join(parts)


def rows(runs: list[dict[str, Any]], untrained: list[dict[str, Any]]) -> list[str]:
    columns: dict[str, list[Numbers]] = {"components": [run["numbers"] for run in runs]}
    for run in runs:
        for null, numbers in run["nulls"].items():
            columns.setdefault(null, []).append(numbers)
    if untrained:
        columns["untrained"] = [run["numbers"] for run in untrained]
    lines = ["| " + " | ".join(["", *columns]) + " |", "| --- " * (1 + len(columns)) + "|"]
    for what in runs[0]["numbers"]:
        cells = [spread([numbers[what] for numbers in column if what in numbers]) for column in columns.values()]
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
    parser.add_argument("--untrained", action="store_true", help="the same of untrained targets too")
    parser.add_argument("--steps", type=int, help="training steps of a decomposition, by default those of the form")
    parser.add_argument("--target-steps", type=int, help="training steps of the targets, by default the target's own")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    kinds = ["", "untrained-"] if arguments.untrained else [""]
    arguments.results.mkdir(parents=True, exist_ok=True)
    for kind, name, form, seed in itertools.product(kinds, arguments.systems, arguments.forms, arguments.seeds):
        file = arguments.results / f"{name}.{form}.{kind}{seed}.json"
        if file.exists():
            continue
        try:
            result = run(name, form, seed, arguments.steps, 0 if kind else arguments.target_steps)
        except apd.NonFinite as error:  # a decomposition that diverges is not the end of the others
            print(f"{name} {form} {kind}{seed} failed: {error}", flush=True)
            continue
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(result, indent=1))
        unfinished.replace(file)
        met = "meets the goal" if result["met"] else "does not meet the goal"
        shown = "; ".join(f"{what} {value:.4g}" for what, value in result["numbers"].items())
        print(f"{name} {form} {kind}{seed} {met}: {shown}; {result['seconds']} s", flush=True)
    summary = table(arguments.results)
    print(f"\n{summary}")
    if arguments.results == HERE / "results":
        (HERE / "README.md").write_text(f"{README}\n{summary}")


if __name__ == "__main__":
    main()
