"""Training with estimated attributions beside training with exact ones: does it end as well?

TMS 40-10, the same targets and batches. MMCS, ML2R and the number of features that have a component of their own look
at the truth. The null control trains with the attributions of the wrong examples.
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from timing import save
from torch import Tensor

import apd_lens as apd
from apd_lens import metrics, toys

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "paper"))
import paper


@dataclass(frozen=True)
class OfTheWrongExamples(apd.GradientAttribution):
    """A null control: every example gets the attributions of the one before."""

    def __call__(self, *args, **kwargs) -> Tensor:
        return super().__call__(*args, **kwargs).roll(1, 0)


WAYS = {
    "exact": apd.GradientAttribution("exact"),
    "16 projections": apd.GradientAttribution(16),
    "8 projections": apd.GradientAttribution(8),
    "4 projections": apd.GradientAttribution(4),
    "of the wrong examples": OfTheWrongExamples("exact"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    targets = [toys.train_tms(40, 10, seed=seed) for seed in range(arguments.seeds)]
    print(f"TMS 40-10, {arguments.steps} steps, means of {arguments.seeds} targets")
    print(f"{'attributions':24}{'features alone':>16}{'MMCS':>8}{'ML2R':>8}{'error':>8}{'agreement':>11}{'seconds':>9}")
    rows = []
    for name, attribution in WAYS.items():
        results = []
        for seed, target in enumerate(targets):
            start = time.perf_counter()
            system = paper.SYSTEMS["tms-40-10"]
            decomposition = paper.decompose(
                system, target, seed, steps=arguments.steps, attribution=attribution, progress=False
            )
            seconds = time.perf_counter() - start
            parts = decomposition.components.component_weights("linear1.weight")
            error = decomposition.attribution_error(target.batches(2048, seed=2000)(0))
            results.append(
                {
                    "features alone": metrics.features_alone(target.rows, parts),
                    "MMCS": metrics.mmcs(target.rows, parts).item(),
                    "ML2R": metrics.ml2r(target.rows, parts).item(),
                    "error": error.relative,
                    "agreement": error.agreement,
                    "seconds": seconds,
                }
            )
        row = {key: statistics.mean(result[key] for result in results) for key in results[0]}
        rows.append({"attributions": name, **row})
        print(f"{name:24}{row['features alone']:16.1f}{row['MMCS']:8.4f}{row['ML2R']:8.3f}{row['error']:8.2f}"
              f"{row['agreement']:11.2f}{row['seconds']:9.0f}", flush=True)  # fmt: skip
    save("estimated_quality", rows)


if __name__ == "__main__":
    main()
