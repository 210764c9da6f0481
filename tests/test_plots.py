import matplotlib as mpl
import pytest
import torch

mpl.use("Agg")
from apd_lens import plots

ATTRIBUTIONS = torch.tensor([[0.0, 0.1, 2.0, 0.3], [1.0, 0.1, 0.0, 0.3], [0.5, 0.1, 0.4, 0.3]])


@pytest.fixture(autouse=True)
def _close():
    yield
    plots.plt.close("all")


def test_components_are_sorted_by_the_data_points_that_they_serve():
    """2 is the top one of the first, 0 of the others; 3 and 1 of none, the stronger first."""
    assert plots.sorted_components(ATTRIBUTIONS) == [2, 0, 3, 1]


def test_the_attribution_matrix_shows_shares_of_each_row():
    figure = plots.attribution_matrix(ATTRIBUTIONS, data_name="fact")
    ax, _ = figure.axes
    shown = torch.from_numpy(ax.images[0].get_array().filled())
    torch.testing.assert_close(shown[0], torch.tensor([1.0, 0.0, 0.15, 0.05]), check_dtype=False)
    assert (shown.max(1).values == 1).all()
    assert ax.get_ylabel() == "fact"
    assert "the last 2 are never active" in ax.get_xlabel()


def test_unit_shares_are_drawn_in_the_given_order_and_place():
    share = torch.rand(4, 6)
    figure, ax = plots.plt.subplots()
    assert plots.unit_share(share, order=[2, 0, 3, 1], ax=ax, unit_name="neuron") is figure
    shown = torch.from_numpy(ax.images[0].get_array().filled())
    torch.testing.assert_close(shown, share[[2, 0, 3, 1]].T, check_dtype=False)
