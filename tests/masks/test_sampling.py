import torch

from apd_lens.masks._sampling import anti_scrubbed_mask, path_mask, random_subsets, scrubbed_mask, usage_matched


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


def test_random_subsets_have_each_size_and_each_thing_alike():
    subsets = random_subsets(torch.rand(6000, 1), torch.rand(6000, 3))
    sizes = subsets.sum(1)
    assert ((sizes[:, None] == torch.tensor([1, 2, 3])).float().mean(0) - 1 / 3).abs().max() < 0.03
    assert (subsets.float().mean(0) - 2 / 3).abs().max() < 0.03


def test_scrubbed_and_anti_scrubbed_differ_by_the_responsible():
    responsible = torch.rand(2000, 4) < 0.3
    scrubbed, anti = scrubbed_mask(responsible, seeded()), anti_scrubbed_mask(responsible, seeded())
    assert torch.equal(scrubbed, anti | responsible)
    assert not (anti & responsible).any()
    n = int((~responsible).sum())
    assert abs(int(anti.sum()) - n / 2) < 4 * (n / 4) ** 0.5


def test_partners_are_inactive_and_as_often_active():
    """Components 0 and 1 are active on 4 data points, 2 on 2, 3 on 1, 4 on all 9, 5 on none."""
    active = torch.zeros(9, 6, dtype=torch.bool)
    active[:4, 0] = active[4:8, 1] = active[:2, 2] = active[8, 3] = active[:, 4] = True
    own, partners = usage_matched(active, seeded())
    assert not own[:, 4].any()  # none is as often active
    assert not partners[:, 5].any()
    # Nearest to 2, within a factor of 2 and inactive there: 3 is on 1 data point, 1 on 4.
    assert partners[:4].nonzero()[:, 1].tolist() == [1, 3, 1, 3, 1, 1]
    assert own[:4].equal(active[:4] & ~(torch.arange(6) == 4))
    assert partners[4:8].nonzero()[:, 1].tolist() == [0] * 4
    assert partners[8].nonzero().tolist() == [[2]]
    assert not (partners & active).any()


def test_partners_are_distinct_and_of_equally_near_ones_any():
    active = torch.eye(40).bool() | torch.eye(40).bool().roll(1, 0)  # two on each data point
    own, partners = usage_matched(active, seeded())
    assert own.equal(active)
    assert (partners.sum(1) == 2).all()
    assert (partners.sum(0) < 12).all()
    assert partners.equal(usage_matched(active, seeded())[1])
