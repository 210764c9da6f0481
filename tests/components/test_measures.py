import pytest
import torch
from torch.testing import assert_close

import apd_lens as apd
from apd_lens.components._measures import effective_rank, input_share, output_share, random_components, singular_values


def components() -> apd.ParameterComponents:
    return apd.ParameterComponents({"w": torch.randn(3, 4, 2)}, {"w": torch.randn(3, 2, 5)})


def test_singular_values_are_those_of_the_built_components():
    parts = components()
    assert_close(singular_values(parts, "w"), torch.linalg.svdvals(parts.component_weights("w"))[:, :2])


def test_random_twins_have_the_same_singular_values_and_other_directions():
    parts = components()
    twins = random_components(parts)
    assert_close(singular_values(twins, "w"), singular_values(parts, "w"))
    assert torch.equal(random_components(parts).A["w"], twins.A["w"])
    assert not torch.equal(random_components(parts, seed=1).A["w"], twins.A["w"])


def test_shares_of_rows_and_columns_by_hand():
    """P_0 = diag(3, 0), P_1 = diag(4, 0)."""
    A = torch.tensor([[[3.0], [0.0]], [[4.0], [0.0]]])
    B = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]])
    parts = apd.ParameterComponents({"w": A}, {"w": B})
    expected = torch.tensor([[9 / 25, 0.0], [16 / 25, 0.0]])
    assert_close(output_share(parts, "w"), expected)
    assert_close(input_share(parts, "w"), expected)


@pytest.mark.parametrize(("spectrum", "rank"), [([5.0, 0.0, 0.0], 1), ([2.0, 2.0, 2.0], 3), ([0.0, 0.0, 0.0], 0)])
def test_effective_ranks_that_are_known(spectrum, rank):
    assert effective_rank(torch.tensor([spectrum])).item() == pytest.approx(rank, abs=1e-5)
