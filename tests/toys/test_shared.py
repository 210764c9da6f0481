import pytest
import torch

import apd_lens as apd
from apd_lens.toys._shared import batch_of_step, check_divides, group_size, train_with_adamw


def data(n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(n, 2, generator=generator)


def test_every_step_and_every_seed_has_a_batch_of_its_own():
    batches = [batch_of_step(data, 3, seed, step) for seed in (0, 1) for step in (-1, 0, 1)]
    assert len({tuple(batch.flatten().tolist()) for batch in batches}) == 6
    assert torch.equal(batch_of_step(data, 3, 1, 0), batches[4])


def test_adamw_finds_the_lowest_point():
    x = torch.zeros(3, requires_grad=True)
    train_with_adamw([x], lambda step: (x - 1).square().sum(), steps=300, lr=0.05, decay=True)
    assert (x - 1).abs().max() < 0.02


def test_sizes_that_cannot_be_are_refused():
    assert (group_size(5, False), group_size(6, True)) == (1, 2)
    check_divides(6, 3, "n")
    with pytest.raises(apd.errors.InvalidSetting, match="even, got 5"):
        group_size(5, True)
    with pytest.raises(apd.errors.InvalidSetting, match="n=5 and n_layers=2"):
        check_divides(5, 2, "n")
