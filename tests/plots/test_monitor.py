"""What the figures of edits and of unusual inputs show; the numbers are read back from what is drawn."""

import matplotlib
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.collections import LineCollection, PathCollection
from numpy.testing import assert_allclose

import apd_lens as apd
from apd_lens import plots

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def test_edit_effects():
    kind = ["components", "random components", "random components", "other components"]
    on_target = torch.tensor([[2.0, 4.0], [0.0, 0.0], [0.1, 0.3], [0.5, 0.5]])
    other = torch.zeros(4, 200)
    other[0, :4] = torch.tensor([1.0, 1.0, 4.0, 2.0])
    other[3] = 1
    ax = plots.edit_effects(kind, on_target, other).axes[0]
    markers = [drawn for drawn in ax.collections if isinstance(drawn, PathCollection)]
    places = {drawn.get_label(): drawn.get_offsets().tolist() for drawn in markers}
    assert list(places) == ["components", "random components", "other components"]
    assert_allclose(places["components"], [[8 / 200, 3]], rtol=1e-6)
    least = 1e-6 * 3  # where what is 0 is drawn
    assert_allclose(places["random components"], [[least, least], [least, 0.2]], rtol=1e-5)
    lines = [drawn for drawn in ax.collections if isinstance(drawn, LineCollection)]
    assert_allclose(lines[0].get_segments()[0], [[8 / 200, 3], [1, 3]], rtol=1e-6)
    with pytest.raises(apd.errors.InvalidSetting, match="Every distance is 0"):
        plots.edit_effects(kind, on_target * 0, other * 0)
    with pytest.raises(apd.errors.InvalidSetting, match="Expected 4 names, one for each edit"):
        plots.edit_effects(kind[:3], on_target, other)


def test_roc():
    anomalous = torch.tensor([False, True, False, True])
    scores = {"surprise": torch.tensor([1.0, 2.0, 3.0, 4.0]), "shuffled labels": torch.ones(4)}
    ax = plots.roc(scores, anomalous).axes[0]
    lines = {line.get_label(): line.get_xydata().tolist() for line in ax.lines[1:]}
    assert lines == {
        "surprise, 0.750": [[0, 0], [0, 0.5], [0.5, 0.5], [0.5, 1], [1, 1]],
        "shuffled labels, 0.500": [[0, 0], [1, 1]],
    }
    with pytest.raises(apd.ShapeMismatch, match=r"Expected 'residual' of shape \(4,\), got \(3,\)"):
        plots.roc(scores | {"residual": torch.ones(3)}, anomalous)
    with pytest.raises(apd.errors.InvalidSetting, match="AUROC compares"):
        plots.roc(scores, torch.ones(4).bool())


def test_score_histogram():
    scores, anomalous = torch.tensor([0.0, 0.1, 0.1, 4.0]), torch.tensor([False, False, False, True])
    ax = plots.score_histogram(scores, anomalous, n_bins=4).axes[0]
    assert ax.get_legend_handles_labels()[1] == ["normal", "anomalous"]
    heights = [[bar.get_height() for bar in container] for container in ax.containers if len(container) == 4]
    assert_allclose(heights, [[1, 0, 0, 0], [0, 0, 0, 1]], rtol=1e-6)
    with pytest.raises(apd.errors.InvalidSetting, match="at least 1 bin"):
        plots.score_histogram(scores, anomalous, n_bins=0)
