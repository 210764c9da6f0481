import pytest
import torch
from matplotlib import pyplot as plt
from support.figures import legend_of, lines, shown
from torch.testing import assert_close

import apd_lens as apd
from apd_lens import plots

SHARES = torch.tensor([[0.0, 0.9, 0.1], [1.0, 0.0, 0.0], [0.2, 0.5, 0.3]])
NODES = ["a0.0", "a0.1", "a1.0"]


def test_components_stand_by_the_node_in_which_they_lie():
    ax, _ = plots.component_nodes(SHARES, NODES, known=["a0.1"]).axes
    assert_close(shown(ax), SHARES[[1, 0, 2]].T, check_dtype=False)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1", "0", "2"]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == NODES
    assert [tick.get_fontweight() for tick in ax.get_yticklabels()] == ["normal", "bold", "normal"]


def test_some_components_in_the_given_order_and_place():
    figure, ax = plt.subplots()
    assert plots.component_nodes(SHARES, NODES, order=[2, 0], ax=ax, measure="attribution") is figure
    assert_close(shown(ax), SHARES[[2, 0]].T, check_dtype=False)
    with pytest.raises(apd.errors.InvalidSetting, match="one for each node"):
        plots.component_nodes(SHARES, NODES[:2])


def test_many_components_are_not_numbered():
    ax, _ = plots.component_nodes(torch.rand(60, 3), NODES).axes
    assert ax.get_xlabel() == "component (sorted by where it lies)"


def test_faithfulness_curves():
    kept = torch.tensor([0, 1, 40])
    curves = {"own": torch.tensor([0.0, 0.5, 1.0]), "shuffled": torch.tensor([0.0, 0.1, 1.0])}
    (ax,) = plots.faithfulness(kept, curves | {"heads": torch.tensor([0.0, 0.3, 1.0])}, unit="head").axes
    assert lines(ax)["the rest off"] == ([0, 1, 40], [0.0, 0.5, 1.0])
    assert legend_of(ax) == ["the rest off", "units in random order, the rest off", "heads"]
    assert ax.get_xlabel() == "heads kept"
    assert ax.get_xscale() == "symlog"
    with pytest.raises(apd.ShapeMismatch, match="'own'"):
        plots.faithfulness(kept, {"own": torch.zeros(2)})


def test_signed_attributions_by_position():
    by_position = torch.tensor([[1.0, -2.0, 0.0], [0.5, 0.0, 0.0]])
    ax, _ = plots.signed_by_position(by_position, metric="logit difference").axes
    assert_close(shown(ax), by_position[:, [0, 2, 1]].T, check_dtype=False)
    assert ax.images[0].get_clim() == (-2.0, 2.0)
    ax, _ = plots.signed_by_position(by_position, components=[1], positions=["the", "cat"]).axes
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["the", "cat"]
    with pytest.raises(apd.errors.InvalidSetting, match="one for each position"):
        plots.signed_by_position(by_position, positions=["the"])
