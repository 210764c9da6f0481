"""Whether torch.compile pays: eager over compiled times of pure parts of a training step and of what they share of it.

    product    Σ_c s_c x A_c B_c, every component multiplied, forward and backward
    losses     faithfulness and simplicity of every matrix, forward and backward
    effects    <∂f/∂y , x P_c> of every output and component, forward alone
    step       a whole `apd_lens.step`, with all three compiled where it calls them

Times are medians of rounds in one run; "first" is the time of the first compiled call, which compiles it.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from timing import median_seconds, save, seconds
from torch import Tensor
from training_step import CASES, Case

import apd_lens as apd
from apd_lens.attribution import _gradient as _attribution
from apd_lens.attribution._effects import component_effects
from apd_lens.components._products import inner_activations, masked_product
from apd_lens.losses._weights import weight_losses
from apd_lens.passes import _watch as _passes
from apd_lens.training import _step as _decompose


def of_weights(weight: Tensor, A: Tensor, B: Tensor, mask: Tensor) -> Tensor:
    return sum(weight_losses(weight, A, B, mask, 0.9))


def with_gradients(part: Callable[..., Tensor], factors: tuple[Tensor, Tensor]) -> Callable[[], object]:
    def run() -> object:
        output = part(*factors)
        return torch.autograd.grad(output, factors, torch.ones_like(output))

    return run


def parts(case: Case) -> dict[str, Callable[[Callable], Callable[[], object]]]:
    """Name -> what makes a run of a part, given how functions are to be compiled."""
    state, batch = case.state(apd.GradientAttribution("exact")), case.batch()
    name = state.components.names[0]
    weight, A, B = state.weights[name], state.components.A[name], state.components.B[name]
    x = torch.randn(len(batch), A.shape[1], generator=torch.Generator().manual_seed(0))
    mask = torch.rand(len(batch), len(A), generator=torch.Generator().manual_seed(1)) < 0.02
    jacobian = torch.randn(16, len(batch), B.shape[2], generator=torch.Generator().manual_seed(2))
    inner = inner_activations(x, A).detach()

    def product(how: Callable) -> Callable[[], object]:
        part = how(masked_product)
        return with_gradients(lambda A, B: part(x, A, B, mask), (A, B))

    def losses(how: Callable) -> Callable[[], object]:
        part = how(of_weights)
        return with_gradients(lambda A, B: part(weight, A, B, mask), (A, B))

    def effects(how: Callable) -> Callable[[], object]:
        part, detached = how(component_effects), B.detach()
        return lambda: part(jacobian, inner, detached, "example")

    return {"product": product, "losses": losses, "effects": effects}


@contextmanager
def compiled_inside() -> Iterator[None]:
    """Inside, `apd_lens.step` calls compiled parts."""
    places = [
        (_passes, "masked_product"),
        (_decompose, "weight_losses"),
        (_attribution, "component_effects"),
    ]
    before = [getattr(module, name) for module, name in places]
    try:
        for (module, name), part in zip(places, before, strict=True):
            setattr(module, name, torch.compile(part))
        yield
    finally:
        for (module, name), part in zip(places, before, strict=True):
            setattr(module, name, part)


def measure(case: Case, rounds: int) -> dict[str, dict[str, float]]:
    rows = {}
    for name, make in parts(case).items():
        eager, compiled = make(lambda part: part), make(torch.compile)
        first = seconds(compiled)
        rows[name] = {"eager": median_seconds(eager, rounds), "compiled": median_seconds(compiled, rounds),
                      "first": first}  # fmt: skip
    run = case.runner("exact")
    eager = median_seconds(run, rounds)
    with compiled_inside():
        first = seconds(run)
        rows["step"] = {"eager": eager, "compiled": median_seconds(run, rounds), "first": first}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} threads; ms, and how many runs make up for the first")
    results = {}
    for case in CASES:
        if arguments.only in str(case):
            results[str(case)] = measure(case, arguments.rounds)
            print(f"\n{case!s:28}{'eager':>9}{'compiled':>10}{'faster':>8}{'first':>9}{'pays after':>12}")
            for part, row in results[str(case)].items():
                saved = row["eager"] - row["compiled"]
                after = f"{row['first'] / saved:12.0f}" if saved > 0 else f"{'never':>12}"
                eager, compiled, first = (1000 * row[column] for column in ("eager", "compiled", "first"))
                print(f"  {part:26}{eager:9.1f}{compiled:10.1f}{eager / compiled:8.2f}{first:9.0f}{after}", flush=True)
    save("compiled", results)


if __name__ == "__main__":
    main()
