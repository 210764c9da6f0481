"""Steps on SmolLM2-135M's shapes with random weights, from four matrices to all 210, beside the bare model.

Components of rank one, 32 active at each position, KL, a path loss, 8 projections, batches that never come again.
Medians of alternating rounds in one process for each row, in seconds of the processor. The bare model's backward pass
has gradients of all its weights:

    attention   W_Q, W_K, W_V, W_O of layer 23, C = 512, 8 × 48 tokens; also of the bare layers 23 to 29
    layers      all 70 matrices of layers 20 to 29, C = 512, 8 × 48 tokens
    all         all 210 matrices of the blocks, C = 1,024, 4 × 128 tokens
    sparse      a forward on 32 of 1,024 components at each position of all 210 matrices, of the bare forward
    growth      a step of W_V and W_O of layer 23 for C = 256 to 8,192, and Adam's share of it

Memory is the peak of a step beside the model, without factors, gradients and moments, of that of the bare model's
forward and backward (on Linux).
"""

import argparse
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from targeted import Suffix, resident, smollm2_shapes
from timing import save
from torch import Tensor
from transformers import LlamaForCausalLM

import apd_lens as apd

BLOCKS = "model.layers.*_proj*"
ROWS: dict[str, dict[str, Any]] = {
    "attention": {"weights": "model.layers.23.self_attn.*", "n_components": 512, "batch": (8, 48)},
    "layers": {
        "weights": [f"model.layers.{layer}.*_proj*" for layer in range(20, 30)],
        "n_components": 512,
        "batch": (8, 48),
    },
    "all": {"weights": BLOCKS, "n_components": 1024, "batch": (4, 128)},
}


def seconds(run: Callable[[], object]) -> float:
    """Of the processor, since others may be at work on the machine."""
    start = time.process_time()
    run()
    return time.process_time() - start


def tokens(shape: Sequence[int], seed: int) -> Tensor:
    return torch.randint(49152, tuple(shape), generator=torch.Generator().manual_seed(seed))


def state_of(model: LlamaForCausalLM, weights: Any, n_components: int, **settings: Any) -> apd.training.State:
    return apd.init(
        model,
        weights=weights,
        n_components=n_components,
        rank=1,
        selection=apd.TopK(32, granularity="position"),
        losses=apd.Losses(distance="kl", normalization="paper"),
        optimization=apd.Optimization(steps=1000, lr=1e-3, scaled=False),
        moves=None,
        **settings,
    )


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def peak(run: Callable[[], object]) -> float:
    """What a run takes at most beside what was there before it, in GB."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier runs have freed
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    run()
    return resident("VmHWM") - before


def step_row(name: str, rounds: int, of_suffix: bool) -> dict[str, float]:
    row, model = ROWS[name], smollm2_shapes().requires_grad_()
    batch = row["batch"]
    suffix, streams = Suffix(model), torch.randn(*batch, 576).requires_grad_()

    def whole(seed: int) -> None:
        loss_of(model(tokens(batch, seed)).logits, tokens(batch, -seed)).backward()
        model.zero_grad()

    def bare_suffix(seed: int) -> None:
        loss_of(suffix(streams, False), tokens(batch, seed)).backward()
        model.zero_grad()

    def step(seed: int) -> None:
        nonlocal state
        state, _ = apd.step(state, tokens(batch, seed))

    result = {"GB of whole": peak(lambda: [whole(seed) for seed in (1, 2)])}
    state = state_of(model, row["weights"], row["n_components"])
    numbers = 4 * sum(factor.numel() for factor in state.components.parameters()) / 1e9
    result["GB of factors, gradients, moments"] = 4 * numbers
    result["GB of step"] = peak(lambda: [step(seed) for seed in (1, 2)]) - 3 * numbers
    runs = {"whole": whole, "step": step} | ({"suffix": bare_suffix} if of_suffix else {})
    times: dict[str, list[float]] = {run: [] for run in runs}
    for seed in range(3, 3 + rounds):
        for run in runs:
            times[run].append(seconds(lambda run=run, seed=seed: runs[run](seed)))
    for run, values in times.items():
        result[run] = statistics.median(values)
        if run != "step":
            result[f"step of {run}"] = statistics.median(a / b for a, b in zip(times["step"], values, strict=True))
    result["memory ratio"] = result["GB of step"] / result["GB of whole"]
    return result


def sparse_row(rounds: int) -> dict[str, float]:
    model, batch = smollm2_shapes(), (4, 128)
    decomposition = state_of(model, BLOCKS, 1024).decomposition()
    scores = torch.rand(*batch, 1024, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(32).indices, True)
    times: dict[str, list[float]] = {"bare": [], "sparse": []}
    with torch.no_grad():
        for seed in range(rounds + 1):
            times["bare"].append(seconds(lambda seed=seed: model(tokens(batch, seed))))
            with decomposition.sparse(mask):
                times["sparse"].append(seconds(lambda seed=seed: model(tokens(batch, seed))))
    ratio = statistics.median(a / b for a, b in zip(times["sparse"][1:], times["bare"][1:], strict=True))
    return {name: statistics.median(values[1:]) for name, values in times.items()} | {"sparse of bare": ratio}


def growth_row(rounds: int) -> dict[str, float]:
    model, result = smollm2_shapes(), {}
    for C in (256, 1024, 8192):
        state = state_of(model, ["model.layers.23.self_attn.v_proj*", "model.layers.23.self_attn.o_proj*"], C)

        def step(seed: int) -> None:
            nonlocal state
            state, _ = apd.step(state, tokens((8, 48), seed))

        result[f"GB of C = {C}"] = peak(lambda: [step(seed) for seed in (1, 2)])
        result[f"C = {C}"] = statistics.median(seconds(lambda seed=seed: step(seed)) for seed in range(3, 3 + rounds))
        result[f"Adam's of C = {C}"] = statistics.median(seconds(state.optimizer.step) for _ in range(rounds))
        del state
    result["growth of time"] = result["C = 8192"] / result["C = 256"]
    result["growth of memory"] = result["GB of C = 8192"] / result["GB of C = 256"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", default=["attention", "layers", "all", "sparse", "growth"])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}")
    for name in arguments.rows:
        if name in ROWS:
            result = step_row(name, arguments.rounds, of_suffix=name == "attention")
        else:
            result = {"sparse": sparse_row, "growth": growth_row}[name](arguments.rounds)
        print(name, *(f"\n    {key:36}{value:9.3f}" for key, value in result.items()), flush=True)
        save(f"scale_{name}", result)


if __name__ == "__main__":
    main()
