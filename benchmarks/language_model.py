"""One training step on a language model of GPT-2-small's shapes with random weights, beside the bare model.

On a CPU the attention and MLP matrices of one layer, C = 512, rank one, a mask for every position, batch 4 × 128. On a
CUDA GPU all 72 matrices of the blocks, C = 4096, under bfloat16 autocast (float32 factors). Attributions are estimated
from random projections of the 50,257 logits. Medians of rounds in one run:

    step      a full training step, as a multiple of the bare model's forward and backward on the same tokens
    sparse    a forward on the selected components, as a multiple of the bare forward
"""

import argparse
import statistics
import warnings
from dataclasses import replace

import torch
from timing import save, seconds
from transformer_lens import HookedTransformer, HookedTransformerConfig

import apd_lens as apd


def gpt2_small(device: str) -> HookedTransformer:
    config = HookedTransformerConfig(
        n_layers=12, d_model=768, n_ctx=1024, d_head=64, n_heads=12, d_mlp=3072, d_vocab=50257,
        act_fn="gelu_new", normalization_type="LN", device=device, seed=0,
    )  # fmt: skip
    with warnings.catch_warnings(action="ignore"):  # that it is deprecated
        return HookedTransformer(config).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--rounds", type=int, default=10 if cuda else 3)
    parser.add_argument("--weights", default="blocks.*.W_*" if cuda else "blocks.6.*W_*")
    parser.add_argument("--components", type=int, default=4096 if cuda else 512)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--batch", type=int, nargs=2, default=(4, 128), metavar=("EXAMPLES", "POSITIONS"))
    arguments = parser.parse_args()
    device = "cuda" if cuda else "cpu"
    where = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads"
    model = gpt2_small(device)
    generator = torch.Generator().manual_seed(0)
    tokens = [
        torch.randint(50257, tuple(arguments.batch), generator=generator).to(device)
        for _ in range(arguments.rounds + 2)
    ]
    with torch.autocast(device, dtype=torch.bfloat16, enabled=cuda):
        state = apd.init(
            model,
            weights=arguments.weights,
            n_components=arguments.components,
            rank=arguments.rank,
            selection=apd.TopK(arguments.k, granularity="position"),
            losses=replace(apd.paper()["losses"], distance="kl", normalization="relative"),
            optimization=apd.Optimization(steps=1000, lr=1e-3, scaled=False),
            moves=None,
        )
        names = state.components.names
        factors = sum(factor.numel() for factor in state.components.parameters())
        shape = f"C = {arguments.components}, rank {arguments.rank}, k = {arguments.k} a position"
        print(f"{where}, torch {torch.__version__}: {len(names)} matrices, {shape}, {factors / 1e6:.1f} M numbers")

        def bare_step(batch: torch.Tensor) -> None:
            model(batch, return_type="loss").backward()
            model.zero_grad()

        @torch.no_grad()
        def bare_forward(batch: torch.Tensor) -> None:
            model(batch)

        def step(batch: torch.Tensor) -> None:
            nonlocal state
            state, _ = apd.step(state, batch)

        @torch.no_grad()
        def sparse_forward(batch: torch.Tensor) -> None:
            with decomposition.sparse(mask):
                model(batch)

        bare_step(tokens[0]), step(tokens[0])
        decomposition = state.decomposition()
        mask = decomposition.select(tokens[0])
        bare_forward(tokens[0]), sparse_forward(tokens[0])
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        times = {run.__name__: [] for run in (bare_step, step, bare_forward, sparse_forward)}
        for batch in tokens[2:]:
            for run in (bare_step, step, bare_forward, sparse_forward):
                times[run.__name__].append(seconds(lambda run=run, batch=batch: run(batch)))
    row = {name: statistics.median(values) for name, values in times.items()}
    for name, ours, bare in (("step", "step", "bare_step"), ("sparse", "sparse_forward", "bare_forward")):
        ratio = statistics.median(a / b for a, b in zip(times[ours], times[bare], strict=True))
        print(f"{name:7}{1000 * row[ours]:9.0f} ms, bare {1000 * row[bare]:8.0f} ms: {ratio:.2f} times")
        row[f"{name} ratio"] = ratio
    if cuda:
        row["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
        print(f"peak memory {row['peak GB']:.1f} GB")
    save("language_model", {"where": where, **vars(arguments), **row})


if __name__ == "__main__":
    main()
