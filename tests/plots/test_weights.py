"""Figures of weights: the shares of units, ranks."""

import torch
from matplotlib import pyplot as plt
from support.figures import dots, shown
from torch.testing import assert_close

from apd_lens import plots


def test_unit_shares_are_drawn_in_the_given_order_and_place():
    share = torch.rand(4, 6)
    figure, ax = plt.subplots()
    assert plots.unit_share(share, order=[2, 0, 3, 1], ax=ax, unit_name="neuron") is figure
    assert_close(shown(ax), share[[2, 0, 3, 1]].T, check_dtype=False)


def test_ranks_are_drawn_where_the_weight_is_and_shares_are_stacked():
    rank, share = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    above, below = plots.rank_and_share(rank, share, names=["h.0.mlp.W_in.weight", "W_out"], order=[1, 0]).axes
    assert dots(above) == {"L0 in": [[0, 3], [1, 1]], "W_out": [[0, 4]]}
    assert [(bar.get_y(), bar.get_height()) for bar in below.patches] == [(0, 0.25), (0, 1), (0.25, 0.75), (1, 0)]
    assert below.get_xlabel() == "component (sorted)"
