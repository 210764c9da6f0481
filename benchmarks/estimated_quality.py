"""Training with estimated attributions beside training with exact ones: does it end as well?

A system of examples/paper, the same targets and batches. What is measured looks at the truth. The null control trains
with the attributions of the wrong examples.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from timing import save
from torch import Tensor

import apd_lens as apd

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


def run(system: paper.System, target: paper.Target, seed: int, way: str, steps: int) -> paper.Numbers:
    start = time.perf_counter()
    decomposition = paper.decompose(system, target, seed, steps=steps, attribution=WAYS[way], progress=False)
    seconds = time.perf_counter() - start
    error = decomposition.attribution_error(target.batches(2048, seed=2000)(0))
    about = {"error": error.relative, "agreement": error.agreement, "seconds": seconds}
    return {**system.measure(target, decomposition), **about}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--system", choices=paper.SYSTEMS, default="tms-40-10")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    system = paper.SYSTEMS[arguments.system]
    targets = [paper.make_target(arguments.system, seed, None) for seed in range(arguments.seeds)]
    print(f"{system.title}, {arguments.steps} steps, targets: {arguments.seeds}")
    print("error: of the selected attributions; agreement: of two halves of the projections on the selection")
    results = {}
    for way in arguments.ways:
        results[way] = [run(system, target, seed, way, arguments.steps) for seed, target in enumerate(targets)]
        print(f"{way}: {paper.spreads(results[way])}", flush=True)
    save(f"estimated_quality-{arguments.system}", results)


if __name__ == "__main__":
    main()
