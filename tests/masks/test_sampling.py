import torch

from apd_lens.masks._sampling import anti_scrubbed_mask, path_mask, scrubbed_mask


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)  # not the seed of every test, which draws the masks


def test_active_ones_stay_on_and_others_are_on_in_part():
    mask = torch.rand(2000, 4) < 0.3
    path = path_mask(mask, seeded())
    assert (path[mask] == 1).all()
    others = path[~mask].sort().values
    assert (others - torch.linspace(0, 1, len(others))).abs().max() < 4 / len(others) ** 0.5  # uniform
    half = path_mask(torch.full((2000, 4), 0.5), seeded())
    assert half.min() == 0.5


def test_scrubbed_and_anti_scrubbed_differ_by_the_responsible():
    responsible = torch.rand(2000, 4) < 0.3
    scrubbed, anti = scrubbed_mask(responsible, seeded()), anti_scrubbed_mask(responsible, seeded())
    assert torch.equal(scrubbed, anti | responsible)
    assert not (anti & responsible).any()
    n = int((~responsible).sum())
    assert abs(int(anti.sum()) - n / 2) < 4 * (n / 4) ** 0.5
