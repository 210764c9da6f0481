"""How the time of a training step grows: with C, rank, width, outputs, sequence length and number of matrices.

One thing at a time is changed on a residual MLP (100 features, width 500, 25 neurons a layer, batch 512, C = 100, rank
8, k = 1) or, for the length of sequences, on a two-layer GPT-2 of width 128. Sparse: a forward and backward on the
active components, beside the same with every component multiplied. Medians of rounds.
"""

import argparse
from collections.abc import Callable, Iterable
from unittest import mock

import torch
from timing import median_seconds, save
from transformers import GPT2Config, GPT2LMHeadModel

import apd_lens as apd
from apd_lens import toys
from apd_lens._passes import sparse_pass


def residual_mlp(
    n_components: int = 100, rank: int = 8, width: int = 500, n_outputs: int = 100, n_layers: int = 1,
    attribution: apd.GradientAttribution | None = None,
) -> tuple[apd.State, torch.Tensor]:  # fmt: skip
    torch.manual_seed(0)
    model = toys.ResidualMLP(n_outputs, width, 25, n_layers).requires_grad_(False)
    state = apd.init(
        model,
        weights="layers.*",
        n_components=n_components,
        rank=rank,
        selection=apd.BatchTopK(1.0),
        attribution=attribution or apd.GradientAttribution("exact"),
    )
    return state, toys.residual_mlp_data(512, torch.Generator().manual_seed(0), n_features=n_outputs)


def gpt2(length: int) -> tuple[apd.State, torch.Tensor]:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=1000, n_positions=512, n_embd=128, n_layer=2, n_head=4, use_cache=False)
    ).eval()
    state = apd.init(
        model,
        weights="transformer.h.*",
        n_components=100,
        rank=1,
        selection=apd.TopK(8, granularity="position"),
        losses=apd.Losses(distance="kl"),
    )
    return state, torch.randint(1000, (4, length), generator=torch.Generator().manual_seed(0))


def step_ms(state: apd.State, batch: torch.Tensor, rounds: int) -> float:
    return 1000 * median_seconds(lambda: apd.step(state, batch.clone()), rounds)


def sparse_ms(state: apd.State, batch: torch.Tensor, rounds: int) -> tuple[float, float]:
    """On the active components; and with all multiplied, then masked."""
    mask = state.decomposition().select(batch)

    def run() -> None:
        output, _ = sparse_pass(state.target, state.components, batch, mask, state.output)
        output.square().mean().backward(inputs=list(state.components.parameters()))

    active = median_seconds(run, rounds)
    with mock.patch("apd_lens._product.cheapest_way", return_value="dense"):
        return 1000 * active, 1000 * median_seconds(run, rounds)


def table(title: str, header: str, values: Iterable[int], measure: Callable[[int], list[float]]) -> dict[str, list]:
    print(f"\n{title:12}{header}")
    rows = []
    for value in values:
        row = measure(value)
        rows.append([value, *row])
        print(f"{value:<12}" + "".join(f"{number:12.1f}" for number in row), flush=True)
    return {title: rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print(f"{torch.get_num_threads()} threads, ms")
    estimated = apd.GradientAttribution(8)

    def by(name: str, attribution: apd.GradientAttribution | None = None) -> Callable[[int], list[float]]:
        def measure(value: int) -> list[float]:
            state, batch = residual_mlp(**{name: value}, attribution=attribution)
            return [step_ms(state, batch, rounds), *sparse_ms(state, batch, rounds)]

        return measure

    def outputs(value: int) -> list[float]:
        return [
            step_ms(*residual_mlp(n_outputs=value, attribution=attribution), rounds)
            for attribution in (apd.GradientAttribution("exact"), estimated)
        ]

    def length(value: int) -> list[float]:
        state, batch = gpt2(value)

        def bare() -> None:
            state.target.model(batch, labels=batch).loss.backward()

        step, forward_backward = step_ms(state, batch, rounds), 1000 * median_seconds(bare, rounds)
        return [step, forward_backward, step / forward_backward]

    columns = f"{'step':>12}{'sparse':>12}{'dense':>12}"
    results = table("C", columns, (100, 400, 1600, 6400), by("n_components", estimated))
    results |= table("rank", columns, (1, 4, 8, 16, 25), by("rank"))
    results |= table("width", columns, (125, 250, 500, 1000), by("width"))
    results |= table("layers", columns, (1, 2, 4), by("n_layers"))
    results |= table("outputs", f"{'exact':>12}{'estimated':>12}", (10, 50, 100, 200, 400, 800), outputs)
    results |= table("positions", f"{'step':>12}{'bare':>12}{'ratio':>12}", (32, 128, 512), length)
    save("growth", results)


if __name__ == "__main__":
    main()
