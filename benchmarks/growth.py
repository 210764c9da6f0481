"""How time and memory of a training step grow: with C, rank, width, outputs, sequence length and number of matrices.

One thing at a time is changed on a residual MLP (100 features, width 500, 25 neurons a layer, batch 512, C = 100, rank
8, k = 1) or, for the length of sequences and the size of a vocabulary, on a two-layer GPT-2 of width 128. Sparse: a
forward and backward on the active components, beside the same with every component multiplied. Medians of rounds.
Memory is the peak of a process of its own, above what it held before the first step; factors are not in it, their
gradients and Adam's moments are.
"""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from unittest import mock

import torch
from timing import median_seconds, peak_bytes, save
from transformers import GPT2Config, GPT2LMHeadModel

import apd_lens as apd
from apd_lens import toys
from apd_lens.attribution import _gradient as _attribution
from apd_lens.data import _points
from apd_lens.passes._replace import Mixture
from apd_lens.passes._watch import replaced_pass


def residual_mlp(
    n_components: int = 100, rank: int = 8, width: int = 500, n_outputs: int = 100, n_layers: int = 1,
    attribution: apd.GradientAttribution | None = None,
) -> tuple[apd.training.State, torch.Tensor]:  # fmt: skip
    torch.manual_seed(0)
    model = toys.ResidualMLP(n_outputs, width, 25, n_layers).requires_grad_(False)
    state = apd.init(
        model,
        weights="layers.*",
        n_components=n_components,
        rank=rank,
        selection=apd.BatchTopK(1.0),
        losses=apd.paper()["losses"],
        moves=None,
        attribution=attribution or apd.GradientAttribution("exact"),
    )
    return state, toys.residual_mlp_data(512, torch.Generator().manual_seed(0), n_features=n_outputs)


def gpt2(
    length: int, vocabulary: int = 1000, n_components: int = 100, granularity: _points.Granularity = "position"
) -> tuple[apd.training.State, torch.Tensor]:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=512, n_embd=128, n_layer=2, n_head=4, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    state = apd.init(
        GPT2LMHeadModel(config).eval(),
        weights="transformer.h.*",
        n_components=n_components,
        rank=1,
        selection=apd.TopK(min(8, n_components), granularity=granularity),
        losses=replace(apd.paper()["losses"], distance="kl"),
        moves=None,
    )
    return state, torch.randint(vocabulary, (4, length), generator=torch.Generator().manual_seed(0))


Made = tuple[apd.training.State, torch.Tensor]


def stepper(make: Callable[[], Made]) -> Callable[[], object]:
    state, batch = make()
    return lambda: apd.step(state, batch.clone())  # another tensor, so that nothing is kept from the last step


def step_ms_and_mb(make: Callable[[], Made], rounds: int) -> list[float]:
    return [1000 * median_seconds(stepper(make), rounds), peak_bytes(partial(stepper, make)) / 1e6]


def sparse_ms(state: apd.training.State, batch: torch.Tensor, rounds: int) -> tuple[float, float]:
    """On the active components; and with all multiplied, then masked."""
    mask = state.decomposition().select(batch)

    def run() -> None:
        replaced = Mixture(state.components, mask)
        output, _ = replaced_pass(state.target, state.components.names, replaced, batch, state.output)
        output.square().mean().backward(inputs=list(state.components.parameters()))

    active = median_seconds(run, rounds)
    with mock.patch("apd_lens.components._products.cheapest_way", return_value="dense"):
        return 1000 * active, 1000 * median_seconds(run, rounds)


def attribution_ms(vocabulary: int, n_components: int, rounds: int) -> list[float]:
    """Attributions of examples of 4 tokens: exact by a product for each output, by one for each component; estimated.
    And up to about how many components the second would take less than the first."""
    state, batch = gpt2(4, vocabulary, n_components, "example")
    decomposition = state.decomposition()
    times = []
    for fewer, projections in ((float("inf"), "exact"), (0, "exact"), (1, 8)):
        settings = replace(decomposition.settings, attribution=apd.GradientAttribution(projections))
        attribute = partial(replace(decomposition, settings=settings).attributions, batch)
        with mock.patch.object(_attribution, "CLEARLY_FEWER", fewer):
            times.append(1000 * median_seconds(attribute, rounds))
    return [*times, times[0] / times[1] * n_components]


def table(title: str, header: str, values: Iterable[int], measure: Callable[[int], list[float]]) -> dict[str, list]:
    print(f"\n{title:12}{header[max(0, len(title) - 12) :]}")
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
            make = partial(residual_mlp, **{name: value}, attribution=attribution)
            return [*step_ms_and_mb(make, rounds), *sparse_ms(*make(), rounds)]

        return measure

    def outputs(value: int) -> list[float]:
        exact, few = (
            step_ms_and_mb(partial(residual_mlp, n_outputs=value, attribution=attribution), rounds)
            for attribution in (apd.GradientAttribution("exact"), estimated)
        )
        return [*exact, *few]

    def length(value: int) -> list[float]:
        state, batch = gpt2(value)

        def bare() -> None:
            state.target.model(batch, labels=batch).loss.backward()

        forward_backward = 1000 * median_seconds(bare, rounds)
        step, memory = step_ms_and_mb(partial(gpt2, value), rounds)
        return [step, memory, forward_backward, step / forward_backward]

    columns = f"{'step':>12}{'MB':>12}{'sparse':>12}{'dense':>12}"
    results = table("C", columns, (100, 400, 1600, 6400), by("n_components", estimated))
    results |= table("rank", columns, (1, 4, 8, 16, 25), by("rank"))
    results |= table("width", columns, (125, 250, 500, 1000), by("width"))
    results |= table("layers", columns, (1, 2, 4), by("n_layers"))
    columns = f"{'exact':>12}{'MB':>12}{'estimated':>12}{'MB':>12}"
    results |= table("outputs", columns, (10, 50, 100, 200, 400, 800), outputs)
    columns = f"{'VJPs':>12}{'JVPs':>12}{'estimated':>12}{'crossover':>12}"
    for C in (4, 16, 64):
        by_kind = partial(attribution_ms, n_components=C, rounds=rounds)
        results |= table(f"C = {C}, vocab", columns, (8, 32, 128, 512), by_kind)
    results |= table("positions", f"{'step':>12}{'MB':>12}{'bare':>12}{'ratio':>12}", (32, 128, 512), length)
    save("growth", results)


if __name__ == "__main__":
    main()
