import inspect
import math

import drawing
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from support.figures import dots, legend_of, lines, shown
from torch import Tensor
from torch.testing import assert_close

import apd_lens as apd
from apd_lens import metrics, plots, toys
from apd_lens.metrics._audit import WORST_FOR_ALL, WORST_OF_EACH

ATTRIBUTIONS = torch.tensor([[0.0, 0.1, 2.0, 0.3], [1.0, 0.1, 0.0, 0.3], [0.5, 0.1, 0.4, 0.3]])

# Three features in two dimensions. Component 2 has feature 0, component 0 the other two; 3 has little, 1 nothing.
ROWS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0]])
PARTS = torch.stack(
    [ROWS * mask for mask in torch.tensor([[0.0, 1, 1], [0, 0, 0], [0.9, 0, 0], [0.1, 0, 0]])[..., None]]
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
EVERY_FIGURE = {
    "attribution_matrix": lambda new: plots.attribution_matrix(new(3, 4)),
    "unit_share": lambda new: plots.unit_share(new(3, 4)),
    "feature_vectors, arrows": lambda new: drawing.feature_vectors(new(3, 2), new(4, 3, 2)),
    "feature_vectors, images": lambda new: drawing.feature_vectors(new(3, 5), new(4, 3, 5)),
    "neuron_contributions": lambda new: drawing.neuron_contributions(new(3, 5), new(4, 3, 5)),
    "component_graph": lambda new: drawing.component_graph([new(2, 3, 4)], [new(2, 4, 3)]),
    "rank_and_share": lambda new: plots.rank_and_share(new(3, 2), new(3, 2)),
    "single_feature_responses": lambda new: drawing.single_feature_responses(new(3, 3), new(3, 3), new(3, 3)),
    "feature_loss": lambda new: drawing.feature_loss(new(3), {"top-1": new(3)}),
    "loss_by_active": lambda new: drawing.loss_by_active((new(5) * 3).int(), new(5), {"top-1": new(5)}),
    "scrubbed_losses": lambda new: drawing.scrubbed_losses(new(9), new(2, 9), new(2, 9)),
    "scrubbed_outputs": lambda new: drawing.scrubbed_outputs(new(5), new(5), new(2, 5), new(2, 5)),
    "audit": lambda new: plots.audit(small_audit(new(8), new(8), new(8))),
    "component_nodes": lambda new: plots.component_nodes(new(4, 2), ["a0.0", "a0.1"]),
    "faithfulness": lambda new: plots.faithfulness((new(5) * 3).int(), {"own": new(5), "heads": new(5)}),
    "signed_by_position": lambda new: plots.signed_by_position(new(3, 4)),
    "match_matrix": lambda new: plots.match_matrix(new(3, 4)),
    "best_matches": lambda new: plots.best_matches({"SAE": new(5), "random": new(5)}, nulls=["random"]),
    "loss_against_sparsity": lambda new: plots.loss_against_sparsity({"SAE": new(4)}, {"SAE": new(4)}),
    "edit_effects": lambda new: plots.edit_effects(["components", "random"], new(2, 1), new(2, 9)),
    "roc": lambda new: plots.roc({"surprise": new(8)}, torch.arange(8, device=new(1).device) > 4),
    "score_histogram": lambda new: plots.score_histogram(new(8), torch.arange(8, device=new(1).device) > 4),
    "where": lambda new: plots.where(apd.scan.Where.from_effects(new(3, 4), ["a", "b", "c"])),
    "loss_curves": lambda new: plots.loss_curves([{"loss": new(1)[0]}] * 3),
    "alive_components": lambda new: plots.alive_components([{"alive": new(1)[0]}] * 3),
    "seed_stability": lambda new: plots.seed_stability(new(2, 3, 3), new(2, 3)),
    "coefficient_valley": lambda new: drawing.coefficient_valley((0.5, 1, 2), new(2, 3), ["path", "simplicity"]),
}


def vectors_of(arrows) -> Tensor:
    return torch.stack([torch.from_numpy(arrows.U), torch.from_numpy(arrows.V)], 1)


def test_components_are_sorted_by_the_data_points_that_they_serve():
    """2 is the top one of the first, 0 of the others; 3 and 1 of none, the stronger first."""
    assert plots.sorted_components(ATTRIBUTIONS) == [2, 0, 3, 1]


def test_the_attribution_matrix_shows_shares_of_each_row():
    figure = plots.attribution_matrix(ATTRIBUTIONS, data_name="fact")
    ax, _ = figure.axes
    assert_close(shown(ax)[0], torch.tensor([1.0, 0.0, 0.15, 0.05]), check_dtype=False)
    assert (shown(ax).max(1).values == 1).all()
    assert ax.get_ylabel() == "fact"
    assert "the last 2 are never the largest" in ax.get_xlabel()
    assert ax.get_lines()[0].get_xdata()[0] == 1.5


def test_nothing_is_said_of_components_that_are_never_the_largest_if_there_is_none():
    ax, _ = plots.attribution_matrix(torch.eye(3)).axes
    assert ax.get_xlabel() == "component (sorted)"
    assert len(ax.get_lines()) == 0


def test_every_figure_takes_axes():
    figures = [
        found for name, found in vars(plots).items() if inspect.isfunction(found) and name != "sorted_components"
    ]
    assert len(figures) > 15
    assert [found.__name__ for found in figures if "ax" not in inspect.signature(found).parameters] == []


SEVERAL = {
    "rank_and_share": lambda ax: plots.rank_and_share(torch.rand(3, 2), torch.rand(3, 2), ax=ax),
    "audit": lambda ax: plots.audit(small_audit(torch.rand(8), torch.rand(8), torch.rand(8)), ax=ax),
    "seed_stability": lambda ax: plots.seed_stability(torch.rand(2, 3, 3), torch.rand(2, 3), ax=ax),
}


@pytest.mark.parametrize("draw", SEVERAL.values(), ids=SEVERAL)
def test_figures_of_several_plots_are_drawn_on_several_axes(draw):
    figure, grid = plt.subplots(2, 2)
    assert draw(grid[0]) is figure
    assert all(ax.has_data() for ax in grid[0])
    assert not any(ax.has_data() for ax in grid[1])
    with pytest.raises(apd.errors.InvalidSetting, match="2 plots: expected ax= of 2 axes, got 4"):
        draw(list(grid.flat))


def test_components_come_in_the_order_of_their_features_then_of_their_norms():
    assert drawing.components_by_feature(ROWS, PARTS) == [2, 0, 3, 1]


def test_vectors_in_two_dimensions_are_arrows_over_those_of_the_target():
    figure = drawing.feature_vectors(ROWS, PARTS)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["target", "sum of components", "component 2", "component 0", "component 3"]
    expected = [ROWS, PARTS.sum(0), *PARTS[[2, 0, 3]]]
    for ax, vectors in zip(figure.axes, expected, strict=True):
        arrows = ax.collections[-1]
        assert_close(vectors_of(arrows), vectors, check_dtype=False)
        if ax.get_title() != "target":
            assert_close(vectors_of(ax.collections[0]), ROWS, check_dtype=False)
    assert [text.get_text() for text in figure.axes[3].texts] == ["1", "2"]
    assert "1 empty component not drawn" in figure.get_suptitle()
    assert same_color(
        figure.axes[0].collections[0].get_facecolors()[1], figure.axes[3].collections[1].get_facecolors()[1]
    )


def test_vectors_in_more_dimensions_are_images_beside_those_of_the_best_components():
    rows = torch.randn(4, 3)
    parts = torch.zeros(5, 4, 3)
    for feature, component in enumerate((3, 0, 4, 1)):
        parts[component, feature] = 0.5 * rows[feature]
    figure = drawing.feature_vectors(rows, parts)
    target, matched, norms = (ax for ax in figure.axes if ax.get_title())
    assert_close(shown(target), rows, check_dtype=False)
    assert_close(shown(matched), 0.5 * rows, check_dtype=False)
    assert_close(shown(norms), 0.5 * torch.eye(4, 5), check_dtype=False)
    assert target.images[0].get_clim() == matched.images[0].get_clim()
    assert "the first 4 are some feature's best" in norms.get_xlabel()


def test_neuron_contributions_show_the_target_above_and_each_features_component_below():
    target = torch.tensor([[1.0, 0.0, 0.4], [0.0, 0.8, 0.24]])
    components = torch.zeros(3, 2, 3)
    components[2, 0] = 0.5 * target[0]
    components[1, 1] = 0.6 * target[1]
    figure = drawing.neuron_contributions(target, components)
    above, below = figure.axes
    for ax, values in ((above, target), (below, torch.stack([0.5 * target[0], 0.6 * target[1]]))):
        x, y = ax.collections[0].get_offsets().T
        assert x.tolist() == [0, 0, 0, 1, 1, 1]
        assert_close(torch.tensor(y.filled()), values.flatten(), check_dtype=False)
    assert [text.get_text() for text in above.texts] == ["0", "2", "1"]  # large ones, largest first, feature by feature
    assert [text.get_text() for text in below.texts] == ["0", "1"]
    assert [label.get_text() for label in below.get_xticklabels()] == ["0\n(2)", "1\n(1)"]

    swapped = drawing.neuron_contributions(target, components, component_of=torch.tensor([1, 2]))
    assert (swapped.axes[1].collections[0].get_offsets()[:, 1] == 0).all()
    with pytest.raises(apd.errors.InvalidSetting, match=r"numbers from 0 to 2, got \[0, 3\]"):
        drawing.neuron_contributions(target, components, component_of=torch.tensor([0, 3]))


def graph_of(target: toys.GatedTarget) -> tuple[list[Tensor], list[Tensor]]:
    W_in, W_out = ([target.mechanisms[name] for name in target.weights[side::2]] for side in (0, 1))
    return W_in, W_out


def test_the_component_graph_has_an_edge_for_each_weight_in_the_colour_of_its_component():
    target = toys.make_gated_functions(n_functions=3, neurons_per_function=4)
    W_in, W_out = graph_of(target)
    figure = drawing.component_graph(W_in, W_out, residual_names=["x", "a", "b", "c", "y"], threshold=0.0)
    (ax,) = figure.axes
    edges = [kind for kind in ax.collections if hasattr(kind, "get_segments")]
    for drawn, weights in zip(edges, [W_in[0], W_out[0], W_in[1], W_out[1]], strict=True):
        assert len(drawn.get_segments()) == weights.count_nonzero()
    of_components = [handle.get_color() for handle in ax.get_legend().get_lines()]
    places, widths = edges[1].get_segments(), edges[1].get_linewidth()
    components, neurons, entries = W_out[0].nonzero(as_tuple=True)
    for component, colour in zip(components, edges[1].get_colors(), strict=True):
        assert same_color(colour[:3], of_components[component])
    sizes = W_out[0][components, neurons, entries].abs()
    assert torch.equal(torch.tensor(widths).argsort(), sizes.argsort())
    assert all(place[0][0] == 1 and place[1][0] == 2 for place in places)  # from the neurons to the right
    assert [text.get_text() for text in ax.texts] == ["layer 0", "layer 1", "x", "a", "b", "c", "y"]
    assert legend_of(ax) == ["component 0", "component 1", "component 2", "negative"]


def test_neurons_of_the_graph_are_sorted_and_coloured_by_their_owner():
    W_in, W_out = torch.zeros(2, 3, 3), torch.zeros(2, 3, 3)
    W_in[1, 0, 0] = W_in[0, 1, 1] = W_in[1, 0, 2] = 1.0
    W_out[1, 0, 2] = W_out[0, 1, 2] = -1.0
    W_in[0, 2, 2] = 0.01  # below the threshold
    (ax,) = drawing.component_graph([W_in], [W_out]).axes
    neurons = next(kind for kind in ax.collections if len(kind.get_offsets()) == 3)
    colours = [handle.get_color() for handle in ax.get_legend().get_lines()]
    assert all(same_color(fill, colours[c]) for fill, c in zip(neurons.get_facecolors(), [0, 1, 1], strict=True))
    read, written = (kind for kind in ax.collections if hasattr(kind, "get_segments"))
    assert len(read.get_segments()) == 3
    assert [style[1] is None for style in read.get_linestyle()] == [True] * 3
    assert [style[1] is None for style in written.get_linestyle()] == [False] * 2  # dashed, being negative
    assert [text.get_text() for text in ax.texts] == ["layer 0", "0", "1", "2"]  # entry 2 is not read


def test_single_feature_responses_have_a_panel_for_each_feature():
    target, sparse, label = torch.randn(4, 5), torch.randn(4, 5), torch.randn(4, 5)
    figure = drawing.single_feature_responses(target, sparse, label, features=[3, 1])
    assert [ax.get_title() for ax in figure.axes] == ["feature 3 active", "feature 1 active"]
    for ax, feature in zip(figure.axes, (3, 1), strict=True):
        for name, values in (("target", target), ("sparse", sparse)):
            assert_close(torch.tensor(dots(ax)[name])[:, 1], values[feature], check_dtype=False)
        assert_close(torch.tensor([bar.get_height() for bar in ax.patches]), label[feature], check_dtype=False)
    assert len(drawing.single_feature_responses(target, sparse).axes[0].patches) == 0
    chosen = [ax.get_title() for ax in drawing.single_feature_responses(torch.eye(100), torch.eye(100)).axes]
    assert chosen == [f"feature {i} active" for i in (0, 20, 40, 59, 79, 99)]
    with pytest.raises(apd.errors.InvalidSetting, match=r"numbers from 0 to 3, got \[4\]"):
        drawing.single_feature_responses(target, sparse, features=[4])


def test_the_loss_of_each_feature_is_sorted_by_the_targets():
    target, top_1 = torch.tensor([0.1, 0.4, 0.2]), torch.tensor([0.3, 0.5, 0.1])
    (ax,) = drawing.feature_loss(target, {"top-1": top_1}).axes
    by_target, by_sparse = (torch.tensor(dots(ax)[name])[:, 1] for name in dots(ax))
    assert_close(by_target, torch.tensor([0.4, 0.2, 0.1]), check_dtype=False)
    assert_close(by_sparse, torch.tensor([0.5, 0.1, 0.3]), check_dtype=False)
    assert legend_of(ax) == ["target, mean 0.23", "sparse, top-1, mean 0.3"]
    assert ax.get_yscale() == "log"
    (ax,) = drawing.feature_loss(target, {}, by_loss=False).axes
    assert_close(torch.tensor(dots(ax)["target, mean 0.23"])[:, 1], target, check_dtype=False)
    with pytest.raises(apd.ShapeMismatch, match=r"'sparse, b' of shape \(3,\), got \(4,\)"):
        drawing.feature_loss(target, {"a": top_1, "b": torch.ones(4)})


def test_losses_are_averaged_by_the_number_of_active_features():
    """0 once with loss 0, which a log axis cannot show; 1 twice with 1 and 3; 2 once with 8."""
    n_active = torch.tensor([1, 2, 1, 0])
    (ax,) = drawing.loss_by_active(n_active, torch.tensor([1.0, 8.0, 3.0, 0.0]), {"top-1": torch.full((4,), 5.0)}).axes
    target, sparse = ax.containers
    assert list(target[0].get_xdata()) == [0, 1, 2]
    assert_close(torch.tensor(target[0].get_ydata()), torch.tensor([math.nan, 2.0, 8.0]), equal_nan=True)
    assert sparse[0].get_ydata().tolist() == [5, 5, 5]
    low, high = target[2][0].get_segments()[1][:, 1]
    assert high == pytest.approx(4)  # 2 standard errors: of 1 and 3 it is sqrt(2) / sqrt(2)
    assert low == pytest.approx(0.2)  # 2 - 2 would be 0
    counts = [label.get_text() for label in ax.child_axes[0].get_xticklabels()]
    assert counts == ["1", "2", "1"]


def test_histograms_of_scrubbed_losses_hold_all_data_points():
    generator = torch.Generator().manual_seed(0)
    target, scrubbed, anti = (10 ** (torch.randn(500, generator=generator) + shift) for shift in (-3, -2, 1))
    target[0] = 0.0
    (ax,) = drawing.scrubbed_losses(target, scrubbed.reshape(5, 100), anti, n_bins=20).axes
    assert ax.get_xscale() == "log"
    filled = [bars for bars in ax.containers if len(bars) == 20]
    for bars in filled:
        assert sum(bar.get_height() for bar in bars) == pytest.approx(1)
    assert len(filled) == 3
    medians = [line.get_xdata()[0] for line in ax.get_lines()]
    assert medians == pytest.approx([values.median().item() for values in (target, scrubbed, anti)])
    assert legend_of(ax)[2] == f"anti-scrubbed, median {anti.median().item():.2g}"
    with pytest.raises(apd.errors.InvalidSetting, match="losses above zero"):
        drawing.scrubbed_losses(torch.zeros(3), torch.zeros(3), torch.zeros(3))


def test_scrubbed_outputs_have_a_curve_for_each_draw():
    x, target = torch.linspace(-1, 1, 7), torch.randn(7)
    scrubbed, anti = torch.randn(4, 7), torch.randn(3, 7)
    (ax,) = drawing.scrubbed_outputs(x, target, scrubbed, anti, input_name="feature 2").axes
    drawn = torch.stack([torch.tensor(line.get_ydata()) for line in ax.get_lines()])
    assert_close(drawn, torch.cat([anti, scrubbed, target[None]]))
    assert legend_of(ax) == ["anti-scrubbed, 3 draws", "scrubbed, 4 draws", "target"]
    assert ax.get_xlabel() == "value of feature 2"


def small_audit(loss: Tensor, null: Tensor, random: Tensor) -> metrics.Audit:
    """Two rows of each attack beside two others."""
    what = ["active ones alone", "a random part of the others", *2 * [WORST_OF_EACH], *2 * [WORST_FOR_ALL]]
    what += 2 * ["with active ones of others"]
    return metrics.Audit(what, [None, None, 20, 40, 20, 40, 1, 2], loss, null, random, 9, 4, 1.0, 0, 0.1, 0.0, 1.0)


def test_an_audit_has_a_dot_for_each_row_and_a_line_for_each_attack():
    nan = math.nan
    audit = small_audit(
        torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, math.inf, 0.1, 0.1]),
        torch.tensor([0.5, 0.6, 0.7, nan, 0.8, nan, 0.9, 0.4]),
        torch.tensor([1.0, nan, nan, nan, nan, nan, nan, nan]),
    )
    left, right = plots.audit(audit).axes
    low, high = left.get_xlim()
    assert 0 < low < 0.1
    assert 1.0 < high < math.inf
    expected = {
        "these components": [[low, 0], [0.1, 1], [0.3, 2], [high, 3], [0.1, 4], [0.1, 5]],
        "null: another data point's": [[0.5, 0], [0.6, 1], [0.7, 2], [0.8, 3], [0.9, 4], [0.4, 5]],
        "null: random components": [[1.0, 0]],
    }
    for name, places in expected.items():
        assert_close(torch.tensor(dots(left)[name]), torch.tensor(places), check_dtype=False)
    names = [label.get_text() for label in left.get_yticklabels()]
    assert names[:3] == ["active ones alone", "a random part of the others", f"{WORST_OF_EACH}: 40"]
    assert names[3:] == [f"{WORST_FOR_ALL}: 40", *(f"with active ones of others: {k}" for k in (1, 2))]
    assert lines(right)["each data point's own"] == ([20, 40], pytest.approx([0.2, 0.3]))
    assert lines(right)["one for all"] == ([20, 40], pytest.approx([0.4, high]))
    assert lines(right)["each data point's own: null, 20 steps"][1] == pytest.approx([0.7, 0.7])
    assert lines(right)["one for all: null, 20 steps"][1] == pytest.approx([0.8, 0.8])
    assert lines(right)["a random part of the others"][1] == pytest.approx([0.1, 0.1])
    with pytest.raises(apd.errors.InvalidSetting, match="above zero"):
        plots.audit(small_audit(torch.zeros(8), torch.zeros(8), torch.zeros(8)))


def test_the_coefficient_valley_has_a_line_for_each_coefficient():
    success = torch.tensor([[0.0, 1.0, 0.5], [1.0, 1.0, 1.0]])
    (ax,) = drawing.coefficient_valley((0.25, 1, 4), success, ["path", "simplicity"]).axes
    for name, values in zip(("path", "simplicity"), success.tolist(), strict=True):
        x, y = lines(ax)[name]
        assert y == values
        assert x == pytest.approx([0.25, 1, 4], rel=0.03)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["×0.25", "×1", "×4"]
    for factors in ((1, 0.5, 4), (0, 1, 2), (1, 2)):
        with pytest.raises(apd.errors.InvalidSetting, match="3 factors that rise"):
            drawing.coefficient_valley(factors, success, ["path", "simplicity"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", EVERY_FIGURE)
def test_tensors_may_be_anywhere_of_any_dtype_and_in_a_graph(name: str, device: str):
    def new(*shape: int) -> Tensor:
        return torch.rand(shape, device=device, dtype=torch.bfloat16).requires_grad_()

    figure = EVERY_FIGURE[name](new)
    assert isinstance(figure, Figure)
    titles = [figure.get_suptitle(), *(ax.get_title() for ax in figure.axes)]
    assert any(titles)


def test_every_figure_is_tried():
    public = {name for name, value in vars(plots).items() if inspect.isfunction(value)}
    public |= {name for name, value in vars(drawing).items() if getattr(value, "__module__", "") == "drawing"}
    functions = {name for name in public if not name.startswith("_")} - {"sorted_components", "components_by_feature"}
    assert functions == {name.partition(",")[0] for name in EVERY_FIGURE}


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.attribution_matrix(torch.ones(3)),
        lambda: drawing.feature_vectors(torch.ones(3, 2), torch.ones(4, 3, 5)),
        lambda: drawing.neuron_contributions(torch.ones(3, 2), torch.ones(4, 2, 2)),
        lambda: drawing.component_graph([torch.ones(2, 3, 4)], [torch.ones(2, 5, 3)]),
        lambda: drawing.component_graph([torch.ones(2, 3, 4)] * 2, [torch.ones(2, 4, 3), torch.ones(1, 4, 3)]),
        lambda: drawing.loss_by_active(torch.ones(3), torch.ones(3), {}),
        lambda: plots.seed_stability(torch.ones(2, 3, 4), torch.ones(2, 3)),
        lambda: drawing.scrubbed_outputs(torch.ones(5), torch.ones(5), torch.ones(2, 5), torch.ones(2, 6)),
    ],
)
def test_other_shapes_and_types_are_refused(draw):
    with pytest.raises(apd.ShapeMismatch):
        draw()
