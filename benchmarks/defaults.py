"""Do the default settings work on systems that nobody tuned them for?

Every system is decomposed with `apd.decompose(model, batches, weights, n_components=…)`, with `output=` where the model
returns more than what is to be explained, and with nothing else. Prints a row a system: on how many targets everything
was found, what was found of what there is, other numbers, and the same of random components with the same spectra.
Each run leaves a JSON in out/defaults/SETTINGS/; runs that are already there are skipped.

    python benchmarks/defaults.py                                  # all systems, seeds 2, 3 and 4
    python benchmarks/defaults.py --systems facts tms-5-2 --seeds 0 1
    python benchmarks/defaults.py --settings paper                 # the paper's own form, `apd.paper()`
    python benchmarks/defaults.py --settings gates                 # gates say what is active, and all else is default
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apd_lens as apd
from apd_lens import toys

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path += [str(EXAMPLES), str(EXAMPLES / "facts"), str(EXAMPLES / "paper")]
import bigrams  # noqa: E402
import evidence  # noqa: E402
import induction  # noqa: E402
import paper  # noqa: E402

OUT = Path("out/defaults")
# Settings were chosen on seeds 0 and 1.
SEEDS = (2, 3, 4)
SETTINGS: dict[str, Callable[[], dict[str, Any]]] = {
    "defaults": dict,
    "paper": apd.paper,
    "gates": lambda: {"masks": apd.Gates()},
    "gates-complete": lambda: {"masks": apd.Gates(), "losses": apd.Losses(completeness=1)},
}

Numbers = dict[str, float]
Batches = Callable[[int], Any] | list[Any]


@dataclass(frozen=True)
class System:
    """What is known of a system; all but the first five is for the measures.

    Attributes:
        make: seed, and the share of the training's steps to take -> a trained or coded target.
        batches: target, seed -> what `decompose` is given.
        weights: of the target.
        output: of the model's return value; None where the default is meant.
        measure: target, decomposition -> numbers, among them "found" and "of".
    """

    title: str
    make: Callable[[int, float], Any]
    batches: Callable[[Any, int], Batches]
    weights: Callable[[Any], list[str]]
    n_components: int
    measure: Callable[[Any, apd.Decomposition], Numbers]
    output: Callable[[Tensor], Tensor] | None = None
    least: float = 1.0


def train(model: nn.Module, loss_at: Callable[[int], Tensor], steps: int, weight_decay: float = 0.0) -> None:
    """AdamW with a learning rate that falls to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    for step in range(steps):
        optimizer.zero_grad()
        loss_at(step).backward()
        optimizer.step()
        schedule.step()
    model.requires_grad_(False)


def sparse_accuracies(decomposition: apd.Decomposition, x: Any, accuracy: Callable[[], float]) -> Numbers:
    """Accuracy on the active components alone, and with a random half of the others on."""
    mask = decomposition.select(x)
    half = apd.metrics.scrubbed_mask(mask, torch.Generator().manual_seed(0))
    with decomposition.sparse(mask):
        sparse = accuracy()
    with decomposition.sparse(half):
        return {"sparse accuracy": sparse, "with half of the inactive": accuracy()}


@dataclass(frozen=True, eq=False)
class Addition:
    """A two-layer network that adds modulo a small number; both summands are one-hot."""

    model: nn.Module
    pairs: Tensor
    sums: Tensor


MODULUS = 7


def train_addition(seed: int, share: float) -> Addition:
    torch.manual_seed(seed)
    summands = torch.cartesian_prod(torch.arange(MODULUS), torch.arange(MODULUS))
    pairs, sums = F.one_hot(summands, MODULUS).flatten(1).float(), summands.sum(1) % MODULUS
    model = nn.Sequential(nn.Linear(2 * MODULUS, 24), nn.ReLU(), nn.Linear(24, MODULUS))
    train(model, lambda step: F.cross_entropy(model(pairs), sums), int(share * 3000), weight_decay=0.1)
    return Addition(model, pairs, sums)


def measure_addition(target: Addition, decomposition: apd.Decomposition) -> Numbers:
    """Pairs that are added rightly on their active components; nobody knows what the mechanisms are."""

    def right() -> float:
        return (target.model(target.pairs).argmax(1) == target.sums).float().mean().item()

    accuracies = sparse_accuracies(decomposition, target.pairs, right)
    found = round(accuracies["sparse accuracy"] * len(target.sums))
    return {"found": float(found), "of": float(len(target.sums)), "target's accuracy": right(), **accuracies}


def measure_facts(target: toys.FactsTarget, decomposition: apd.Decomposition) -> Numbers:
    """A fact is found if it has a component of its own, as in the examples. A weaker measure beside it: facts whose
    component serves none with another answer, since two subjects with one answer may be one mechanism."""
    component = evidence.top_components(decomposition, target)
    forgotten = evidence.forgetting(decomposition, component, target)
    served = [set(target.answers[torch.tensor(component) == c].tolist()) for c in component]
    return {
        "found": float(evidence.n_alone(component)),
        "of": float(len(target.answers)),
        "apart by answer": float(sum(len(answers) == 1 for answers in served)),
        "own fact forgotten": forgotten.own_share,
        "others forgotten": forgotten.others_share,
        **sparse_accuracies(decomposition, target.prompts, target.accuracy),
    }


def measure_induction(target: toys.InductionTarget, decomposition: apd.Decomposition) -> Numbers:
    """Found is the share of next tokens that are right on the active components, in per cent of the target's; and where
    the components lie that matter for the right logit."""
    batch = toys.sequences(64, seed=2)
    accuracy = lambda: induction.known_loss_and_accuracy(target.model, batch)[1]  # noqa: E731
    located = induction.located(decomposition, batch, target.heads)
    accuracies = sparse_accuracies(decomposition, batch.tokens, accuracy)
    return {
        "found": round(100 * accuracies["sparse accuracy"] / accuracy()),
        "of": 100.0,
        "target's accuracy": accuracy(),
        **accuracies,
        "weight in the two heads": located.shares()[0],
    }


def of_the_paper(name: str) -> System:
    """A system of examples/paper, without what was chosen for it but C and the batch."""
    system = paper.SYSTEMS[name]

    def make(seed: int, share: float) -> Any:
        full = {"tms": 5000, "res": 10_000, "gat": 1}[name[:3]]
        return paper.make_target(name, seed, max(1, int(share * full)))

    return System(
        system.title,
        make,
        lambda target, seed: target.batches(system.batch_size, seed=1000 + seed),
        lambda target: target.weights,
        system.n_components,
        system.measure,
        least=0.95,
    )


def with_facts(title: str, n_components: int, **sizes: int) -> System:
    return System(
        title,
        lambda seed, share: toys.train_facts(seed=seed, **sizes),
        lambda target, seed: [target.prompts],
        lambda target: ["blocks.*.mlp.*"],
        n_components,
        measure_facts,
        toys.centred_logits,
        least=0.95,
    )


SYSTEMS = {
    **{name: of_the_paper(name) for name in paper.SYSTEMS},
    "facts": with_facts("64 facts in 48 neurons", 100),
    "bigrams": System(
        "40 bigrams in 12 dimensions",
        lambda seed, share: bigrams.train_target(seed),
        lambda target, seed: [target.prompts],
        lambda target: ["embed.W_E", "unembed.W_U"],
        60,
        measure_facts,
        lambda logits: logits[:, -1],
        least=0.95,
    ),
    "induction": System(
        "induction transformer",
        lambda seed, share: toys.train_induction(seed=seed, steps=max(1, int(share * 1500))),
        lambda target, seed: lambda step: toys.sequences(24, seed=10**5 * seed + step).tokens,
        lambda target: target.weights,
        60,
        measure_induction,
        induction.centred,
        least=0.9,
    ),
    "addition": System(
        "addition modulo 7, new",
        train_addition,
        lambda target, seed: [target.pairs],
        lambda target: ["*.weight"],
        60,
        measure_addition,
        least=0.95,
    ),
    "facts-40": with_facts("96 facts in 40 neurons, new", 140, n_subjects=96, d_model=128, n_neurons=40),
}


def run(name: str, seed: int, settings: dict[str, Any], share: float = 1.0) -> dict[str, Any]:
    """One target, decomposed and measured, beside random components with the same singular values."""
    system = SYSTEMS[name]
    target = system.make(seed, share)
    model = getattr(target, "model", target)
    given = {} if system.output is None else {"output": system.output}
    batches = system.batches(target, seed)
    start = time.perf_counter()
    decomposition = apd.decompose(
        model, batches, system.weights(target), n_components=system.n_components, seed=seed, **given, **settings
    )
    seconds = time.perf_counter() - start
    random = replace(decomposition, components=apd.components.random_components(decomposition.components))
    batch = batches(-2) if callable(batches) else batches[0]
    numbers, null = (
        {**system.measure(target, each), "residual": each.residuals()["all"]} for each in (decomposition, random)
    )
    mask = decomposition.select(batch)
    return {
        "numbers": {**numbers, "active": mask.sum(-1).float().mean().item()},
        "null": null,
        "succeeded": numbers["found"] >= system.least * numbers["of"] and numbers.get("identity", 1.0) >= system.least,
        "seconds": seconds,
    }


def results(folder: Path, name: str, seeds: list[int]) -> list[dict[str, Any]]:
    files = [folder / f"{name}-{seed}.json" for seed in seeds]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def table(folder: Path, names: list[str], seeds: list[int]) -> Iterator[str]:
    """As markdown. Numbers are those of all seeds, smallest to largest."""
    which = f"seeds {', '.join(map(str, seeds))}; settings were chosen on 0 and 1"
    yield f"| system ({which}) | succeeded | found | random | numbers | seconds |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name in names:
        if runs := results(folder, name, seeds):
            met = f"{sum(run['succeeded'] for run in runs)} of {len(runs)}"
            found, null = (
                f"{paper.spread([run[kind]['found'] for run in runs])} of {runs[0][kind]['of']:g}"
                for kind in ("numbers", "null")
            )
            others = [
                {key: value for key, value in run["numbers"].items() if key not in ("found", "of")} for run in runs
            ]
            seconds = paper.spread([round(run["seconds"]) for run in runs])
            yield f"| {SYSTEMS[name].title} | {met} | {found} | {null} | {paper.spreads(others)} | {seconds} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--settings", choices=SETTINGS, default="defaults")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    folder = arguments.out / (arguments.settings + ("-quick" if arguments.quick else ""))
    folder.mkdir(parents=True, exist_ok=True)
    settings = SETTINGS[arguments.settings]()
    if arguments.quick:
        settings["optimization"] = replace(settings.get("optimization", apd.Optimization()), steps=20)
    for name, seed in itertools.product(arguments.systems, arguments.seeds):
        file = folder / f"{name}-{seed}.json"
        if not file.exists():
            result = run(name, seed, settings, 0.01 if arguments.quick else 1.0)
            file.write_text(json.dumps(result, indent=1))
            print(f"{name} seed {seed}: {paper.spreads([result['numbers']])}; {result['seconds']:.0f} s", flush=True)
    print("\n".join(table(folder, arguments.systems, arguments.seeds)))


if __name__ == "__main__":
    main()
