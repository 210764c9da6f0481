"""Does a copy of an active mechanism belong to its component? Everything is computed twice, and either would do:
y = min(1, 2 x + 2 x), by two matrices.

Prints, for each way to say what is active, without and with `Losses(completeness=1)`: how many components are active on
a feature; the squared error on them alone; what of the feature is left in the model when they are taken out, the mean
and the most over features and seeds; and what is left when those of another feature are taken out, or random
components of the same singular values in their place, which should be all of it.

    python benchmarks/copies.py                        # seeds 3 to 7; settings were chosen on 0 to 2
    python benchmarks/copies.py --seeds 0 --steps 60
"""

import argparse
import itertools
from typing import Any

import torch
from torch import Tensor, nn

import apd_lens as apd

WAYS: dict[str, dict[str, Any]] = {"top-k, k found": {}, "gates": {"masks": apd.Gates(hidden=32)}}
N_FEATURES = 4


class Twice(nn.Module):
    """y = min(1, x W + x V), W and V being 2 for each feature."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = (nn.Linear(N_FEATURES, N_FEATURES, bias=False) for _ in range(2))
        for layer in (self.one, self.other):
            layer.weight.data = 2 * torch.eye(N_FEATURES)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.one(x) + self.other(x)).clamp(0, 1)


def measured(seed: int, steps: int, completeness: float, **way: Any) -> list[Tensor]:
    """Of each feature: active components, squared error on them alone, and what is left without them, without those of
    another feature, and without random ones."""
    torch.manual_seed(seed)
    model, x = Twice(), torch.eye(N_FEATURES)
    losses, optimization = apd.Losses(completeness=completeness), apd.Optimization(steps=steps)
    decomposition = apd.decompose(
        model, [x], n_components=8, rank=2, seed=seed, progress=False, losses=losses, optimization=optimization, **way
    )
    random = apd.components.random_components(decomposition.components, seed)
    twins = apd.from_factors(model, random.A, random.B)
    mask = decomposition.select(x)

    def left(of: apd.Decomposition, out: Tensor) -> Tensor:
        with of.sparse(~out, rest=1.0):
            return model(x).diagonal()

    with decomposition.sparse(mask):
        error = (model(x) - x).square().sum(1)
    return [
        mask.sum(1).float(),
        error,
        left(decomposition, mask),
        left(decomposition, mask.roll(1, 0)),
        left(twins, mask),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5, 6, 7])
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    print(
        "| active | completeness | how many | error | left without them: mean, most | another's: mean | random: mean |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for (name, way), completeness in itertools.product(WAYS.items(), (0.0, 1.0)):
        runs = [measured(seed, arguments.steps, completeness, **way) for seed in arguments.seeds]
        active, error, left, of_another, of_random = (torch.cat(column) for column in zip(*runs, strict=True))
        print(
            f"| {name} | {completeness:g} | {active.mean():.2g} | {error.mean():.1e} | {left.mean():.2f}, "
            f"{left.max():.2f} | {of_another.mean():.2f} | {of_random.mean():.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
