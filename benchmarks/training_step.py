"""One training step beside the textbook's (benchmarks/textbook.py): time, peak memory, and that the result is the same.

Both do the same work on the same factors and batch, in turn: textbook, exact attributions, estimated ones. Ratios are
medians over rounds. Peak memory is that of a process of its own, above what it held before the first step.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import textbook
import torch
from timing import peak_bytes, save, seconds
from torch import Tensor, nn

import apd_lens as apd
from apd_lens import toys

PROJECTIONS = 8


@dataclass(frozen=True)
class Case:
    """A system with the paper's settings; its weights are random, since the time does not depend on them."""

    system: str
    n_layers: int
    batch_size: int

    def __str__(self) -> str:
        name = (
            "TMS 40-10" if self.system == "tms" else f"residual MLP, {self.n_layers} layer{'s' * (self.n_layers > 1)}"
        )
        return f"{name}, batch {self.batch_size}"

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        if self.system == "tms":
            return toys.TMS(40, 10).requires_grad_(False)
        model = toys.ResidualMLP(100, 1000, 50 // self.n_layers, self.n_layers)
        return model.requires_grad_(False)

    def batch(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        if self.system == "tms":
            return toys.tms_data(self.batch_size, generator, n_features=40)
        return toys.residual_mlp_data(self.batch_size, generator)

    def state(self, attribution: apd.GradientAttribution) -> apd.training.State:
        paper = apd.paper()["losses"]
        if self.system == "tms":
            losses = replace(paper, minimality=10.0, simplicity=20.0, schatten_p=0.9)
            n_components, k = 50, 1.0
        else:
            two = self.n_layers == 2
            losses = replace(
                paper,
                minimality=2.0 if two else 1.0,
                simplicity=7.0 if two else 10.0,
                schatten_p=0.9,
                hidden=1.0,
                hidden_at=tuple(f"layers.{i}.act" for i in range(self.n_layers)),
            )
            n_components, k = 200 if two else 130, 1.28
        return apd.init(
            self.model(),
            weights="linear*" if self.system == "tms" else "layers.*",
            n_components=n_components,
            rank=None,
            selection=apd.BatchTopK(k),
            attribution=attribution,
            losses=losses,
            optimization=apd.Optimization(steps=10_000, lr=1e-3, scaled=False, init_scale=1.0, start="random"),
            moves=None,
        )

    def runner(self, way: str) -> Callable[[], Tensor]:
        """Takes a step and gives its loss, "textbook", "exact" or "estimated"."""
        state = self.state(apd.GradientAttribution("exact" if way != "estimated" else PROJECTIONS))
        batch = self.batch()
        if way == "textbook":
            return textbook_runner(state, batch)

        def run() -> Tensor:
            nonlocal state
            state, info = apd.step(state, batch.clone())  # another tensor, so that nothing is kept from the last step
            return info.loss

        return run


CASES = [Case("mlp", layers, batch) for layers in (1, 2) for batch in (256, 2048)] + [Case("tms", 1, 2048)]


def textbook_runner(state: apd.training.State, batch: Tensor) -> Callable[[], Tensor]:
    A, B = (
        {name: nn.Parameter(factor.detach().clone()) for name, factor in factors.items()}
        for factors in (state.components.A, state.components.B)
    )
    uses = [use for name in A for use in state.target.weights[name].uses]
    book = textbook.Textbook(
        sites=[textbook.Site(use.site, use.matrix, use.transposed) for use in uses],
        weights=state.weights,
        k=state.settings.selection.k,
        losses=state.settings.losses,
    )
    optimizer = torch.optim.Adam([*A.values(), *B.values()], lr=0.0)
    for group in optimizer.param_groups:
        group["lr"] = state.settings.optimization.lr / (
            0.05 * state.settings.optimization.steps
        )  # the first of warm-up
    return lambda: textbook.step(state.target.model, book, A, B, optimizer, batch)


def measure(case: Case, rounds: int) -> dict[str, float | str]:
    ways = ("textbook", "exact", "estimated")
    runs = {way: case.runner(way) for way in ways}
    losses = {way: run().item() for way, run in runs.items()}
    times = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            times[way].append(seconds(runs[way]))
    peaks = {way: peak_bytes(partial(case.runner, way)) for way in ways}
    row: dict[str, float | str] = {"case": str(case), "losses differ by": abs(losses["exact"] / losses["textbook"] - 1)}
    for way in ways:
        row[f"{way} ms"] = 1000 * statistics.median(times[way])
        row[f"{way} MB"] = peaks[way] / 1e6
    for way in ways[1:]:
        pairs = zip(times["textbook"], times[way], strict=True)
        row[f"{way} times faster"] = statistics.median(book / ours for book, ours in pairs)
        row[f"{way} memory"] = peaks[way] / peaks["textbook"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; full training step, medians of "
          f"{arguments.rounds} rounds; estimated from {PROJECTIONS} projections")  # fmt: skip
    print(f"{'':30}{'textbook':>16}{'exact':>16}{'faster':>8}{'memory':>8}{'estimated':>11}{'faster':>8}{'losses':>9}")
    rows = []
    for case in CASES:
        if arguments.only in str(case):
            row = measure(case, arguments.rounds)
            rows.append(row)
            print(
                f"{row['case']:30}{row['textbook ms']:7.0f} ms{row['textbook MB']:6.0f}{row['exact ms']:7.0f} ms"
                f"{row['exact MB']:6.0f}{row['exact times faster']:8.1f}{row['exact memory']:8.2f}"
                f"{row['estimated ms']:8.0f} ms{row['estimated times faster']:8.1f}{row['losses differ by']:9.0e}",
                flush=True,
            )
    save("training_step", rows)


if __name__ == "__main__":
    main()
