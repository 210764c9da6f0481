import pytest
import torch
from torch.testing import assert_close

from apd_lens.start._groups import centred, cosines, grouped, similarities_of_points


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("memory", [None, 1])
def test_similarities_are_those_of_the_outer_products(memory: int | None):
    x, g = torch.randn(9, 4, generator=seeded()), torch.randn(3, 9, 5, generator=seeded(1))
    points = torch.tensor([0, 0, 1, 2, 2, 2, 3, 1, 0])
    phi = torch.zeros(4, 3 * 4 * 5)
    for t, point in enumerate(points.tolist()):
        phi[point] += torch.einsum("d,ko->kdo", x[t], g[:, t]).flatten()
    assert_close(similarities_of_points(x @ x.mT, g, points, 4, memory), phi @ phi.mT)


def test_products_of_items_less_the_mean_of_their_kind():
    x, kinds = torch.randn(6, 3, generator=seeded()), torch.tensor([4, 4, 1, 4, 9, 9])
    less = x.clone()
    for kind in (4, 9):
        less[kinds == kind] -= x[kinds == kind].mean(0)
    assert_close(centred(x @ x.mT, kinds), less @ less.mT)


def test_an_item_of_no_length_is_similar_to_none():
    x = torch.tensor([[3.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    assert_close(cosines(x @ x.mT), torch.tensor([[1, 0, 0.5**0.5], [0, 0, 0], [0.5**0.5, 0, 1]]))


def known_groups(n_groups: int, size: int, noise: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    directions = torch.linalg.qr(torch.randn(20, 20, generator=seeded()))[0][:n_groups]
    labels = torch.arange(n_groups).repeat(size)
    x = directions[labels] + noise * torch.randn(len(labels), 20, generator=seeded(1)) / 20**0.5
    return x, labels


@pytest.mark.parametrize("most", [7, 11, 27])
def test_the_number_of_groups_is_found(most: int):
    x, labels = known_groups(7, 4)
    assert grouped(cosines(x @ x.mT), x.norm(dim=1), most).equal(labels)


def test_data_points_that_do_little_have_no_say():
    x, labels = known_groups(5, 4)
    noise = torch.randn(6, 20, generator=seeded(2))
    little = torch.cat([x, 1e-2 * x, 1e-2 * noise])
    found = grouped(cosines(little @ little.mT), little.norm(dim=1), 12)
    assert found[:40].equal(labels.repeat(2))
    assert found.max() == 4


def test_as_few_different_data_points_as_groups_are_one_each():
    assert grouped(torch.eye(3), torch.ones(3), 3).tolist() == [0, 1, 2]
    assert grouped(torch.eye(3)[[0, 1, 0, 2, 1]][:, [0, 1, 0, 2, 1]], torch.ones(5), 3).tolist() == [0, 1, 0, 2, 1]
    assert grouped(torch.zeros(3, 3), torch.zeros(3), 3).tolist() == [0, 1, 2]
    assert grouped(torch.ones(3, 3), torch.ones(3), 1).tolist() == [0, 0, 0]
