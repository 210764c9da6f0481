"""Ways to compute a masked product, forward and backward, and what the cost model of apd_lens/_product.py chooses.

Prints, for shapes from toy models to language models, the time of each way, the one chosen, and how much slower it is
than the best one; then the model's constants as these times would have them.
"""

import argparse

import torch
from timing import median_seconds, save
from torch import Tensor

import apd_lens as apd
from apd_lens import _product
from apd_lens._product import active_pairs, cheapest_way, pairwise_product

# rows, C, d_in, m, d_out, k
SHAPES = [
    (256, 130, 1000, 50, 50, 1.28),
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


def times(shape: tuple[int, int, int, int, int, float], rounds: int) -> tuple[dict[str, float], str]:
    n_rows, C, d_in, m, d_out, k = shape
    x = torch.randn(n_rows, d_in, requires_grad=True)
    A, B = torch.randn(C, d_in, m, requires_grad=True), torch.randn(C, m, d_out, requires_grad=True)
    chosen = torch.rand(n_rows, C).flatten().topk(int(k * n_rows)).indices
    mask = torch.zeros(n_rows * C, dtype=torch.bool).index_fill(0, chosen, True).view(n_rows, C)
    active, upstream = active_pairs(mask), torch.randn(n_rows, d_out)

    def both_ways(product: Tensor) -> object:
        return torch.autograd.grad(product, (x, A, B), upstream)

    runs = {
        "dense": lambda: both_ways(apd.masked_product(x, A, B, mask)),
        "grouped": lambda: both_ways(pairwise_product(x, A, B, mask, active, "grouped")),
    }
    if m == 1:
        runs["gathered"] = lambda: both_ways(pairwise_product(x, A, B, mask, active, "gathered"))
    return {way: median_seconds(run, rounds) for way, run in runs.items()}, cheapest_way(n_rows, A, B, mask, active)


def fitted_constants(rows: list[tuple[tuple, dict[str, float]]]) -> dict[str, float]:
    """The constants, in multiply-adds of the dense product, by least squares of relative errors."""
    per_multiply_add = sorted(t["dense"] / (n * C * m * (i + o)) for (n, C, i, m, o, _), t in rows)[len(rows) // 2]
    terms = torch.tensor([[C * m * (i + o), k * n * (i + o), C] for (n, C, i, m, o, k), _ in rows], dtype=torch.float64)
    costs = torch.tensor(
        [t["grouped"] / per_multiply_add - k * n * (i + o) * m for (n, C, i, m, o, k), t in rows], dtype=torch.float64
    )
    solution = torch.linalg.lstsq(terms / costs[:, None], torch.ones(len(rows), 1, dtype=torch.float64)).solution
    fitted = dict(zip(("_PER_WEIGHT", "_PER_GATHERED", "_PER_GROUP"), solution[:, 0].tolist(), strict=True))
    rank_one = [
        t["gathered"] / per_multiply_add / (k * n * (i + o)) for (n, _, i, _, o, k), t in rows if "gathered" in t
    ]
    return {**fitted, "_PER_GATHERED_ROW": sum(rank_one) / len(rank_one)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} threads; forward and backward, ms")
    print(f"{'rows':>6}{'C':>6}{'d_in':>6}{'m':>4}{'d_out':>6}{'k':>6}{'dense':>10}{'grouped':>10}{'gathered':>10}"
          f"  chosen    over the best")  # fmt: skip
    rows, results = [], []
    for shape in SHAPES:
        seconds, chosen = times(shape, arguments.rounds)
        rows.append((shape, seconds))
        shown = "".join(
            f"{1000 * seconds[way]:10.1f}" if way in seconds else " " * 10 for way in ("dense", "grouped", "gathered")
        )
        n_rows, C, d_in, m, d_out, k = shape
        over = seconds[chosen] / min(seconds.values())
        print(f"{n_rows:6}{C:6}{d_in:6}{m:4}{d_out:6}{k:6.4g}{shown}  {chosen:9} {over:.2f}", flush=True)
        results.append({"shape": shape, "seconds": seconds, "chosen": chosen})
    print("constants as these times would have them, beside those in use:")
    for name, value in fitted_constants(rows).items():
        print(f"{name:20}{value:12.0f}{getattr(_product, name):12.0f}")
    save("sparse_product", results)


if __name__ == "__main__":
    main()
