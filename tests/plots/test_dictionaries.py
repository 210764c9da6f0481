import pytest
import torch
from support.figures import legend_of, shown
from torch.testing import assert_close

import apd_lens as apd
from apd_lens import plots

SIMILARITY = torch.tensor([[0.1, 0.2, 0.9, 0.0], [1.0, 0.0, 0.1, 0.0], [0.0, 0.0, 0.8, 0.3]])


def test_pairs_lie_on_the_diagonal_the_most_alike_first():
    partner = torch.tensor([2, 0, -1])
    ax = plots.match_matrix(SIMILARITY, partner).axes[0]
    assert_close(shown(ax), SIMILARITY[[1, 0, 2]][:, [0, 2, 1, 3]])
    assert ax.images[0].get_clim() == (0, 1)


def test_without_an_assignment_the_best_free_latent_is_taken():
    ax = plots.match_matrix(SIMILARITY).axes[0]
    assert_close(shown(ax), SIMILARITY[[1, 0, 2]][:, [0, 2, 1, 3]])


def test_cosines_with_a_sign_have_colours_around_0():
    ax = plots.match_matrix(SIMILARITY - 0.5, torch.tensor([2, 0, 3]), label="cosine").axes[0]
    assert ax.images[0].get_clim() == (-1, 1)
    assert_close(shown(ax).diag(), torch.tensor([0.5, 0.4, -0.2]))


def test_assignments_that_are_none_are_refused():
    for partner in ([2, 2, 0], [4, 0, 1]):
        with pytest.raises(apd.errors.InvalidSetting, match="a latent of its own below 4"):
            plots.match_matrix(SIMILARITY, torch.tensor(partner))


def test_histograms_of_what_was_found_and_of_its_null():
    best = {"SAE": torch.tensor([0.9, 0.95, torch.nan, 1.0]), "random": torch.tensor([0.2, 0.3])}
    ax = plots.best_matches(best, nulls=["random"], label="F1").axes[0]
    assert legend_of(ax) == ["SAE, mean 0.95", "random, mean 0.25"]
    assert ax.get_xlabel() == "best F1"
    steps = [patch for patch in ax.patches if patch.get_label().startswith(("SAE", "random"))]
    assert [max(patch.get_path().vertices[:, 1]) for patch in steps] == [1, 1]
    with pytest.raises(apd.errors.InvalidSetting, match="values under each name"):
        plots.best_matches({"SAE": torch.tensor([torch.nan])})


def test_curves_are_sorted_and_leave_out_what_a_log_axis_cannot_show():
    sparsity = {"components": torch.tensor([4.0, 0.0, 1.0, 8.0]), "null": torch.tensor([1.0, 2.0])}
    loss = {"components": torch.tensor([0.1, 2.0, 1.0, 1e-12]), "null": torch.tensor([2.0, 2.0])}
    ax = plots.loss_against_sparsity(sparsity, loss, nulls=["null"], target_loss=0.01).axes[0]
    lines = {line.get_label(): (line.get_xdata().tolist(), line.get_ydata().tolist()) for line in ax.get_lines()[:2]}
    assert lines["components"][0] == [1, 4]
    assert lines["components"][1] == pytest.approx([1, 0.1])
    assert lines["null"] == ([1, 2], [2, 2])
    assert legend_of(ax) == ["components", "null", "target"]
    assert ax.get_xscale() == ax.get_yscale() == "log"
    with pytest.raises(apd.ShapeMismatch, match=r"Expected losses of 'null' of shape \(2,\), got none"):
        plots.loss_against_sparsity(sparsity, {"components": loss["components"]})
    with pytest.raises(apd.errors.InvalidSetting, match="at most 6 curves"):
        plots.loss_against_sparsity(
            {str(i): torch.ones(1) for i in range(7)}, {str(i): torch.ones(1) for i in range(7)}
        )
