import math

import pytest
import torch
from torch.testing import assert_close

import apd_lens as apd
from apd_lens import metrics

# Two features in three dimensions, and three components. Feature 0: component 1 has its direction, at half the norm.
# Feature 1 = (0, 2, 0): component 2 has cosine 0.8 and norm 5, component 0 cosine 0.6.
ROWS = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
COMPONENTS = torch.tensor(
    [[[0.0, 1.0, 0.0], [0.0, 6.0, 8.0]], [[0.5, 0.0, 0.0], [0.0, 0.0, 0.0]], [[-2.0, 0.0, 0.0], [0.0, 4.0, 3.0]]]
)


def test_mmcs_and_ml2r_by_hand():
    assert metrics.best_components(ROWS, COMPONENTS).tolist() == [1, 2]
    assert metrics.mmcs(ROWS, COMPONENTS).item() == pytest.approx((1 + 0.8) / 2)
    assert metrics.ml2r(ROWS, COMPONENTS).item() == pytest.approx((0.5 + 5 / 2) / 2)


def test_the_truth_itself_scores_one_in_any_order_and_scale_of_directions():
    mechanisms = torch.diag_embed(torch.ones(4)).unsqueeze(-1) * torch.randn(4, 3)
    rows = mechanisms.sum(0)
    shuffled = mechanisms[[2, 0, 3, 1]]
    assert metrics.mmcs(rows, shuffled).item() == pytest.approx(1)
    assert metrics.ml2r(rows, shuffled).item() == pytest.approx(1)
    assert metrics.mmcs(rows, 0.9 * shuffled).item() == pytest.approx(1)
    assert metrics.ml2r(rows, 0.9 * shuffled).item() == pytest.approx(0.9)


def test_random_directions_score_low():
    """The largest of 20 cosines in 400 dimensions is about sqrt(2 ln 20 / 400) = 0.12."""
    rows, components = torch.randn(30, 400), torch.randn(20, 30, 400)
    assert 0.05 < metrics.mmcs(rows, components) < 0.15


def test_whole_mechanisms_can_be_compared():
    mechanisms = torch.randn(3, 4, 5)
    components = torch.cat([torch.randn(1, 4, 5), mechanisms.flip(0)])
    spread = components.flatten(1)[:, None].expand(-1, 3, -1)
    assert metrics.best_components(mechanisms.flatten(1), spread).tolist() == [3, 2, 1]
    assert metrics.mmcs(mechanisms.flatten(1), spread).item() == pytest.approx(1)


def test_neuron_contributions_by_hand():
    """Two features, two residual dimensions, one neuron that reads (3, 5) and writes (7, 11)."""
    eye, W_in, W_out = torch.eye(2), torch.tensor([[3.0], [5.0]]), torch.tensor([[7.0, 11.0]])
    assert_close(metrics.neuron_contributions(eye, W_in, W_out, eye), torch.tensor([[21.0], [55.0]]))
    assert_close(metrics.neuron_contributions(eye.flip(1), W_in, W_out, eye), torch.tensor([[35.0], [33.0]]))


def test_neuron_contributions_of_components_are_each_its_own():
    W_E, W_U = torch.randn(4, 6), torch.randn(6, 4)
    W_in, W_out = torch.randn(3, 6, 5), torch.randn(3, 5, 6)
    together = metrics.neuron_contributions(W_E, W_in, W_out, W_U)
    assert together.shape == (3, 4, 5)
    for c in range(3):
        assert_close(together[c], metrics.neuron_contributions(W_E, W_in[c], W_out[c], W_U))


def test_scrubbed_masks_keep_the_responsible_and_anti_scrubbed_ones_remove_them():
    responsible = torch.rand(2000, 3, 10) < 0.2
    scrubbed, anti_scrubbed = (
        mask(responsible, torch.Generator().manual_seed(1))
        for mask in (metrics.scrubbed_mask, metrics.anti_scrubbed_mask)
    )
    assert scrubbed[responsible].all()
    assert not anti_scrubbed[responsible].any()
    assert torch.equal(scrubbed & ~responsible, anti_scrubbed)
    others = scrubbed[~responsible].float()
    assert abs(others.mean() - 0.5) < 4 * 0.5 / math.sqrt(len(others))
    assert not torch.equal(metrics.scrubbed_mask(responsible), metrics.scrubbed_mask(responsible))


def test_layer_share_by_hand():
    """Component 0 has squared norms 9 and 16; component 1 lies in the first matrix; component 2 is nowhere."""
    one = torch.ones(3, 1, 1)
    components = apd.ParameterComponents(
        {"first": one, "second": one},
        {"first": torch.tensor([3.0, 2.0, 0.0])[:, None, None], "second": torch.tensor([4.0, 0.0, 0.0])[:, None, None]},
    )
    assert_close(metrics.layer_share(components), torch.tensor([[0.36, 0.64], [1.0, 0.0], [0.0, 0.0]]))


def test_ranks_count_what_is_above_the_tolerance_of_the_largest():
    spectra = torch.tensor([[10.0, 1.0], [0.05, 0.04], [0.2, 0.05]])
    components = apd.ParameterComponents(
        {"weight": torch.diag_embed(spectra)}, {"weight": torch.eye(2).repeat(3, 1, 1)}
    )
    assert metrics.ranks(components).sum(1).tolist() == [2, 0, 1]
    assert metrics.ranks(components, tolerance=0.2).sum(1).tolist() == [1, 0, 0]
    twice = apd.ParameterComponents(
        {name: torch.diag_embed(spectra) for name in "ab"}, {name: torch.eye(2).repeat(3, 1, 1) for name in "ab"}
    )
    assert metrics.ranks(twice).sum(1).tolist() == [4, 0, 2]


def test_description_length_by_hand():
    """Of 4 components (2 bits each), 1 and 2 are active: 1.5 on average. Ranks 1 and 1 + 5, α = 3: 3 and 18 bits."""
    mask = torch.tensor([[True, False, False, False], [True, True, False, False]])
    length = metrics.description_length(mask, torch.tensor([1.0, 5.0, 100.0, 100.0]), alpha=3)
    assert length.selection == pytest.approx(1.5 * 2)
    assert length.parameters == pytest.approx((3 + 18) / 2)
    assert length.total == pytest.approx(13.5)
    assert length.alpha == 3
    positions = mask[:, None].expand(-1, 7, -1)
    assert metrics.description_length(positions, torch.ones(4), 0.0) == metrics.DescriptionLength(3.0, 0.0, 0.0)


def test_effective_rank_is_the_one_of_the_core():
    assert metrics.effective_rank(torch.tensor([[2.0, 2.0, 0.0]])).item() == pytest.approx(2)


def test_features_alone_share_no_component_and_own_theirs():
    rows, parts = torch.eye(3), torch.zeros(4, 3, 3)
    parts[0, 0, 0] = 1.0
    parts[1, 1, 1], parts[1, 2, 2] = 1.0, 1.0  # one component for two features
    assert metrics.features_alone(rows, parts) == 1
    parts[1, 2] = torch.tensor([0.2, 0.0, 0.0])  # 4 % of its squared norm is in the row of the third feature,
    parts[2, 2, 2] = 1.0  # which has one of its own
    assert metrics.features_alone(rows, parts) == 3
    assert metrics.features_alone(rows, parts, share=0.99) == 2
    assert metrics.features_alone(rows, torch.randn(4, 3, 3)) == 0  # random components
