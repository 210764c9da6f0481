"""What interception costs: forward times as ratios to the bare model, of rounds in one run.

    idle      inside a context that changes nothing, ablate([])
    entered   the same, and with it entering and leaving the context
    watched   x and y of every use kept for attributions, with the graph behind them; to a bare forward with gradients
    sparse    a mask of its own for every example, on C components of rank m

The bare forward is timed in every round, before and after; the ratio is the median over rounds.
"""

import argparse
import statistics
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from timing import save, seconds
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import GPT2Config, GPT2LMHeadModel

import apd_lens as apd
from apd_lens.passes._watch import watched_pass

WEIGHTS = {"HookedTransformer": "blocks.*", "Hugging Face GPT-2": "transformer.h.*"}


def hooked_transformer(d_model: int, n_layers: int) -> HookedTransformer:
    config = HookedTransformerConfig(
        n_layers=n_layers, d_model=d_model, n_ctx=128, d_head=64, n_heads=d_model // 64, d_vocab=1000,
        act_fn="gelu_new", normalization_type="LN", device="cpu", seed=0,
    )  # fmt: skip
    with warnings.catch_warnings(action="ignore"):  # that it is deprecated
        return HookedTransformer(config).eval()


def hugging_face(d_model: int, n_layers: int) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=1000, n_positions=128, n_embd=d_model, n_layer=n_layers, n_head=d_model // 64, use_cache=False
    )
    return GPT2LMHeadModel(config).eval()


def seconds_inside(run: Callable[[], object], inside: Callable[[], AbstractContextManager[None]]) -> float:
    """Of `run` alone, not of entering the context that it runs in."""
    with inside():
        return seconds(run)


def ratio(
    run: Callable[[], object],
    bare: Callable[[], object],
    rounds: int,
    inside: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> float:
    """Median over rounds of the time of `run` over the mean of the bare times around it."""
    seconds_inside(run, inside), bare()
    ratios, before = [], seconds(bare)
    for _ in range(rounds):
        middle, after = seconds_inside(run, inside), seconds(bare)
        ratios.append(2 * middle / (before + after))
        before = after
    return statistics.median(ratios)


def measure(model: torch.nn.Module, weights: str, n_components: int, rounds: int) -> dict[str, float]:
    tokens = torch.randint(1000, (4, 128), generator=torch.Generator().manual_seed(0))
    decomposition = apd.init(model, weights=weights, n_components=n_components, rank=1).decomposition()
    names = decomposition.components.names

    @torch.no_grad()
    def forward() -> object:
        return model(tokens)

    def with_gradients() -> object:
        return model(tokens)

    def watched() -> object:
        return watched_pass(decomposition.target, names, tokens, decomposition.output)

    def entered() -> object:
        with decomposition.ablate([]):
            return forward()

    mask = torch.rand(4, n_components, generator=torch.Generator().manual_seed(0)) < 0.1
    return {
        "bare": ratio(forward, forward, rounds),
        "idle": ratio(forward, forward, rounds, inside=lambda: decomposition.ablate([])),
        "entered": ratio(entered, forward, rounds),
        "watched": ratio(watched, with_gradients, rounds),
        "sparse": ratio(forward, forward, rounds, inside=lambda: decomposition.sparse(mask)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--components", type=int, default=64)
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, batch 4 × 128, every matrix of the blocks; ratios to the bare model")
    columns = ("bare", "idle", "entered", "watched", "sparse")
    print(" " * 36 + "".join(f"{column:>9}" for column in columns))
    results = {}
    for d_model, n_layers in ((64, 2), (256, 4), (768, 4)):
        for name, make in {"HookedTransformer": hooked_transformer, "Hugging Face GPT-2": hugging_face}.items():
            model = make(d_model, n_layers)
            row = measure(model, WEIGHTS[name], arguments.components, arguments.rounds)
            label = f"{name}, d {d_model}, {n_layers} layers"
            results[label] = row
            print(f"{label:36}" + "".join(f"{row[column]:9.3f}" for column in columns))
    save("overhead", results)


if __name__ == "__main__":
    main()
