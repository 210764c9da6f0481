"""A decomposition in several processes, beside the same in one.

    torchrun --nproc-per-node 2 examples/several_processes.py

Every process is given the same batches and takes its part of the examples of each, so the factors are those of one
process but for rounding: they differ by less than 1e-6 (float64), or it fails. The model is tiny, so that several
processes are no faster: what they say to each other takes longer. Half a minute; without a launcher it is one process.
"""

import argparse
import time

from torch import distributed

import apd_lens as apd
from apd_lens.toys import train_tms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--target-steps", type=int, default=2000)
    arguments = parser.parse_args()

    if distributed.is_torchelastic_launched():
        distributed.init_process_group()
    together = distributed.is_initialized()
    is_first = not together or distributed.get_rank() == 0

    target = train_tms(20, 5, steps=arguments.target_steps)  # seeded, so it is the same model in all processes
    model, batches = target.model.double(), target.batches(1024)  # likewise the same batches

    def decomposed() -> tuple[apd.Decomposition, float]:
        started = time.perf_counter()
        decomposition = apd.decompose(
            model,
            lambda step: batches(step).double(),
            target.weights,
            n_components=24,
            optimization=apd.Optimization(steps=arguments.steps),
            progress=is_first,
        )
        return decomposition, time.perf_counter() - started

    several, seconds = decomposed()
    n_processes = distributed.get_world_size() if together else 1
    if together:
        distributed.destroy_process_group()  # from here on each process is alone
    if is_first:
        one, seconds_of_one = decomposed()
        pairs = zip(several.components.parameters(), one.components.parameters(), strict=True)
        difference = max((ours - theirs).abs().max().item() for ours, theirs in pairs)
        print(f"{arguments.steps} steps: {n_processes} processes {seconds:.1f} s, one {seconds_of_one:.1f} s")
        print(f"largest difference of a factor: {difference:.0e}")
        assert difference < 1e-6, "the factors are not alike"


if __name__ == "__main__":
    main()
