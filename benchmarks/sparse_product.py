"""Ways to compute a masked product, forward and backward, and what the cost model of components/_pairs.py chooses.

Prints, for shapes from toy models to language models, the time of each way, the one chosen, and how much slower it is
than the best one; then the model's constants as these times would have them.
"""

import argparse
from dataclasses import dataclass
from itertools import product

import torch
from timing import median_seconds, save
from torch import Tensor

import apd_lens as apd
from apd_lens.components import _pairs
from apd_lens.components._pairs import active_pairs, cheapest_way, pairwise_product

# rows, C, d_in, m, d_out, k
SHAPES = [
    (256, 130, 1000, 50, 50, 1.28),
    (256, 130, 50, 50, 1000, 1.28),
    (256, 200, 1000, 25, 25, 1.28),
    (2048, 130, 1000, 50, 50, 1.28),
    (2048, 130, 50, 50, 1000, 1.28),
    (2048, 200, 25, 25, 1000, 1.28),
    (2048, 50, 40, 10, 10, 1.0),
    (64, 100, 256, 4, 48, 1.0),
    (512, 512, 768, 1, 3072, 16.0),
    (512, 512, 768, 4, 768, 16.0),
    (512, 4096, 768, 1, 768, 16.0),
    (512, 4096, 768, 4, 768, 16.0),
]


@dataclass(frozen=True)
class Times:
    """Seconds of each way; the way that is chosen."""

    seconds: dict[str, float]
    chosen: str


def times(shape: tuple[int, int, int, int, int, float], skewed: bool, rounds: int) -> Times:
    """Skewed: some components are active much more often than others."""
    n_rows, C, d_in, m, d_out, k = shape
    x = torch.randn(n_rows, d_in, requires_grad=True)
    A, B = torch.randn(C, m, d_in).mT.requires_grad_(), torch.randn(C, m, d_out, requires_grad=True)
    scores = torch.rand(n_rows, C) + (torch.rand(C) if skewed else 0)
    chosen = scores.flatten().topk(int(k * n_rows)).indices
    mask = torch.zeros(n_rows * C, dtype=torch.bool).index_fill(0, chosen, True).view(n_rows, C)
    active, upstream = active_pairs(mask), torch.randn(n_rows, d_out)

    def both_ways(y: Tensor) -> object:
        return torch.autograd.grad(y, (x, A, B), upstream)

    runs = {
        "dense": lambda: both_ways(apd.components.masked_product(x, A, B, mask)),
        "grouped": lambda: both_ways(pairwise_product(x, A, B, mask, active, "grouped")),
        "sparse": lambda: both_ways(pairwise_product(x, A, B, mask, active, "sparse")),
    }
    seconds = {way: median_seconds(run, rounds) for way, run in runs.items()}
    return Times(seconds, cheapest_way(n_rows, A, B, mask, active))


def fitted_constants(rows: list[tuple[tuple, Times]]) -> dict[str, float]:
    """The constants, in multiply-adds of the dense product, by least squares of relative errors."""
    dense = sorted(t.seconds["dense"] / (n * C * m * (i + o)) for (n, C, i, m, o, _), t in rows)
    per_multiply_add = dense[len(rows) // 2]
    terms, costs = [], []
    for (n, C, i, m, o, k), t in rows:
        pairs = k * n * (i + o)
        terms += [[C * m * (i + o), pairs, C, 0, 0], [0, 0, 0, pairs * m, 1]]
        costs += [t.seconds["grouped"] / per_multiply_add - pairs * m, t.seconds["sparse"] / per_multiply_add]
    # A product that takes less than its multiply-adds would says nothing of what comes on top of them.
    usable = [row for row, cost in enumerate(costs) if cost > 0]
    of_terms, of_costs = (torch.tensor(each, dtype=torch.float64)[usable] for each in (terms, costs))
    solution = torch.linalg.lstsq(of_terms / of_costs[:, None], torch.ones(len(usable), 1, dtype=torch.float64))
    names = ("_PER_WEIGHT", "_PER_GATHERED", "_PER_GROUP", "_PER_SPARSE", "_PER_CALL")
    return dict(zip(names, solution.solution[:, 0].tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} threads; forward and backward, ms")
    ways = ("dense", "grouped", "sparse")
    print(f"{'rows':>6}{'C':>6}{'d_in':>6}{'m':>4}{'d_out':>6}{'k':>6}"
          + "".join(f"{way:>10}" for way in ways) + "  chosen    over the best")  # fmt: skip
    rows, results = [], []
    for shape, skewed in product(SHAPES, (False, True)):
        t = times(shape, skewed, arguments.rounds)
        rows.append((shape, t))
        shown = "".join(f"{1000 * t.seconds[way]:10.1f}" for way in ways)
        n_rows, C, d_in, m, d_out, k = shape
        over = t.seconds[t.chosen] / min(t.seconds.values())
        print(f"{n_rows:6}{C:6}{d_in:6}{m:4}{d_out:6}{k:6.4g}{shown}  {t.chosen:9} {over:.2f}", flush=True)
        results.append({"shape": shape, "seconds": t.seconds, "chosen": t.chosen})
    print("constants as these times would have them, beside those in use:")
    for name, value in fitted_constants(rows).items():
        print(f"{name:20}{value:12.0f}{getattr(_pairs, name):12.0f}")
    save("sparse_product", results)


if __name__ == "__main__":
    main()
