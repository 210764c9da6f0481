"""Figures of the paper's systems: functions of tensors that return a matplotlib figure."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator, PercentFormatter
from torch import Tensor

from apd_lens import metrics
from apd_lens._checks import checked
from apd_lens._errors import InvalidSetting, ShapeMismatch
from apd_lens.plots._draw import (
    ANTI_SCRUBBED,
    LABEL,
    NULL,
    PALETTE,
    SCRUBBED,
    SPARSE,
    TARGET,
    axes,
    check_names,
    colours,
    grid,
    image,
    legend,
    panels,
    plain,
    plain_curves,
    whole_numbers,
)
from apd_lens.plots._weights import _EMPTY


@checked
def single_feature_responses(
    target: Float[Tensor, "n_features n_outputs"],
    sparse: Float[Tensor, "n_features n_outputs"],
    label: Float[Tensor, "n_features n_outputs"] | None = None,
    *,
    features: Sequence[int] | None = None,
) -> Figure:
    """All outputs on inputs in which one feature is active, a panel for each of some features.

    Args:
        target, sparse: row i is the output where feature i alone is active, of the target and of the sparse model.
        label: what the target was trained to give.
        features: which to draw; default six of them, evenly spread.

    Raises:
        InvalidSetting: no feature, or one that does not exist.

    Source: the paper's residual MLP.
    """
    n_features, n_outputs = target.shape
    features = _evenly(n_features, 6) if features is None else features
    if not features or not 0 <= min(features) <= max(features) < n_features:
        raise InvalidSetting(f"features must be numbers from 0 to {n_features - 1}, got {features}.")
    target, sparse = plain(target), plain(sparse)
    figure, drawn = panels(len(features), min(len(features), 2), 5.0, 1.7)
    outputs = range(n_outputs)
    size = 34 if n_outputs <= 40 else 12
    for ax, feature in zip(drawn, features, strict=True):
        grid(ax)
        if label is not None:
            ax.bar(outputs, plain(label)[feature].numpy(), width=0.8, color=LABEL, label="label", zorder=1)
        ax.scatter(
            outputs, target[feature].numpy(), s=size, facecolors="none", edgecolors=TARGET, label="target", zorder=2
        )
        ax.scatter(outputs, sparse[feature].numpy(), s=size / 4, color=SPARSE, label="sparse", zorder=3)
        ax.set_title(f"feature {feature} active", fontsize=10)
        ax.margins(x=0.02)
        whole_numbers(ax.xaxis)
    figure.supxlabel("output", fontsize=10)
    figure.supylabel("value", fontsize=10)
    handles, names = drawn[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", frameon=False)
    figure.suptitle("Outputs where one feature alone is active")
    return figure


def _evenly(n: int, most: int) -> list[int]:
    return torch.linspace(0, n - 1, min(n, most), dtype=torch.float32, device="cpu").round().int().tolist()


@checked
def feature_loss(
    target: Float[Tensor, " n_features"],
    sparse: Mapping[str, Float[Tensor, " n_features"]],
    *,
    by_loss: bool = True,
    ax: Axes | None = None,
) -> Figure | SubFigure:
    """Loss of each feature on a log axis, of the target and of sparse models; the mean stands in the legend.

    Args:
        target: mean loss over data points in which the feature is active, or in which it alone is.
        sparse: name of a way to select -> the same; such as "top-1" and "batch top-k".
        by_loss: whether to sort features by the target's loss, largest first.

    Raises:
        ShapeMismatch: a curve of another shape than the target's.

    Source: the paper's residual MLP.
    """
    ax, curves = axes(ax, 7.5), plain_curves({"target": target, **_named_sparse(sparse)}, target)
    order = plain(target).argsort(descending=True) if by_loss else torch.arange(len(target), device="cpu")
    size = 24 if len(order) <= 40 else 12
    for (name, losses), colour, marker in zip(curves.items(), [TARGET, *PALETTE], "osD^vP*", strict=False):
        mean = f"{name}, mean {losses.mean().item():.2g}"
        ax.scatter(
            range(len(order)), losses[order].numpy(), s=size, color=colour, marker=marker, label=mean, alpha=0.85
        )
    ax.set(
        yscale="log",
        xlabel="feature (sorted by the target's loss)" if by_loss else "feature",
        ylabel="loss",
        title="Loss of each feature",
    )
    whole_numbers(ax.xaxis)
    ax.margins(x=0.02)
    grid(ax)
    legend(ax)
    return ax.figure


def _named_sparse(sparse: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if len(sparse) > len(PALETTE):
        raise InvalidSetting(f"Expected at most {len(PALETTE)} curves, got {len(sparse)}: {list(sparse)}.")
    return {f"sparse, {name}": curve for name, curve in sparse.items()}


@checked
def loss_by_active(
    n_active: Int[Tensor, " data"],
    target: Float[Tensor, " data"],
    sparse: Mapping[str, Float[Tensor, " data"]],
    *,
    counted: str = "features",
    ax: Axes | None = None,
) -> Figure | SubFigure:
    """Mean loss of the data points on which so many features, or components, are active; on a log axis.

    Bars are two standard errors each way, down to a tenth of the mean at most, where more than one data point has that
    number. How many have it stands above the axes.

    Args:
        n_active: number of active features, or components, of each data point.
        target: loss of each data point.
        sparse: name of a way to select -> the same; such as "top-1" and "batch top-k".
        counted: what `n_active` counts.

    Raises:
        ShapeMismatch: a curve of another shape than the target's.
    """
    ax, curves = axes(ax, 7.5), plain_curves({"target": target, **_named_sparse(sparse)}, target)
    numbers, group, counts = n_active.cpu().unique(return_inverse=True, return_counts=True)
    for (name, losses), colour, marker in zip(curves.items(), [TARGET, *PALETTE], "osD^vP*", strict=False):
        mean = torch.zeros(len(numbers), dtype=losses.dtype, device="cpu").index_add_(0, group, losses) / counts
        squares = torch.zeros_like(mean).index_add_(0, group, (losses - mean[group]).square())
        error = 2 * (squares / (counts - 1).clamp_min(1) / counts).sqrt()
        below = torch.minimum(error, 0.9 * mean)
        mean[mean == 0] = torch.nan
        ax.errorbar(
            numbers.numpy(),
            mean.numpy(),
            [below.tolist(), error.tolist()],
            color=colour,
            marker=marker,
            ms=5,
            capsize=2,
            lw=1.2,
            label=name,
        )
    ax.set(yscale="log", xlabel=f"active {counted} of a data point", ylabel="mean loss")
    ax.set_title(f"Loss by number of active {counted}")
    whole_numbers(ax.xaxis)
    top = ax.secondary_xaxis("top")
    top.set_xticks(numbers.tolist(), [f"{count:,}" for count in counts.tolist()], fontsize=7, color="0.4")
    top.set_xlabel("data points", fontsize=7, color="0.4")
    top.tick_params(length=0, pad=1)
    top.spines[:].set_visible(False)
    grid(ax)
    legend(ax)
    return ax.figure


@checked
def scrubbed_losses(
    target: Float[Tensor, "*target"],
    scrubbed: Float[Tensor, "*scrubbed"],
    anti_scrubbed: Float[Tensor, "*anti_scrubbed"],
    *,
    n_bins: int = 60,
    ax: Axes | None = None,
) -> Figure | SubFigure:
    """Histograms of the loss of each data point on a log axis: of the target, and scrubbed and anti-scrubbed.

    Dashed lines are medians, which stand in the legend. Losses below the 0.5 % quantile of those above zero are counted
    in the first bin.

    Args:
        target, scrubbed, anti_scrubbed: losses in any shape, such as of several random scrubbings; see
            `apd_lens.metrics.scrubbed_mask`.

    Raises:
        InvalidSetting: no loss is above zero, or n_bins < 1.

    Source: the paper's residual MLPs, after causal scrubbing.
    """
    losses = {
        ("target", TARGET): plain(target).flatten(),
        ("scrubbed", SCRUBBED): plain(scrubbed).flatten(),
        ("anti-scrubbed", ANTI_SCRUBBED): plain(anti_scrubbed).flatten(),
    }
    together = torch.cat(list(losses.values()))
    positive = together[together > 0]
    if len(positive) == 0 or n_bins < 1:
        raise InvalidSetting(f"Expected losses above zero and at least 1 bin, got {len(positive)} and {n_bins}.")
    smallest = positive.kthvalue(1 + len(positive) // 200).values
    low, high = smallest.log10().item() - 0.01, positive.max().log10().item() + 0.01
    edges = torch.logspace(low, high, n_bins + 1, dtype=together.dtype)
    ax = axes(ax, 7.5)
    for (name, colour), values in losses.items():
        label = f"{name}, median {values.median().item():.2g}"
        binned, shares = values.clamp_min(edges[0]).numpy(), np.full(len(values), 1 / len(values))
        ax.hist(binned, edges.tolist(), weights=shares, color=colour, alpha=0.15)
        ax.hist(
            binned,
            edges.tolist(),
            weights=shares,
            color=colour,
            histtype="step",
            lw=1.6,
            label=label,
        )
        ax.axvline(max(values.median().item(), edges[0].item()), color=colour, linestyle="--", linewidth=1)
    ax.set(xscale="log", xlabel="loss of a data point", ylabel="share of data points")
    ax.set_title("Loss of data points, scrubbed and anti-scrubbed")
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    grid(ax)
    legend(ax)
    return ax.figure


@checked
def scrubbed_outputs(
    x: Float[Tensor, " points"],
    target: Float[Tensor, " points"],
    scrubbed: Float[Tensor, "draws points"],
    anti_scrubbed: Float[Tensor, "other_draws points"],
    *,
    input_name: str = "input",
    ax: Axes | None = None,
) -> Figure | SubFigure:
    """One output against the one input that is varied: of the target, and of every random scrubbing.

    Args:
        x: values of the input.
        scrubbed, anti_scrubbed: the output under a mask for each draw, see `apd_lens.metrics.scrubbed_mask`.

    Source: the paper's residual MLPs, after causal scrubbing.
    """
    ax, at = axes(ax, 7.0), plain(x).numpy()
    for name, curves, colour in (
        ("anti-scrubbed", anti_scrubbed, ANTI_SCRUBBED),
        ("scrubbed", scrubbed, SCRUBBED),
    ):
        lines = ax.plot(at, plain(curves).T.numpy(), color=colour, linewidth=0.9, alpha=0.6)
        lines[0].set_label(f"{name}, {len(lines)} draws")
    ax.plot(at, plain(target).numpy(), color=TARGET, linewidth=1.8, linestyle="--", label="target")
    ax.set(xlabel=f"value of {input_name}", ylabel="output", title=f"Output as {input_name} varies")
    ax.locator_params(axis="x", nbins=6)
    grid(ax)
    legend(ax)
    return ax.figure


@checked
def coefficient_valley(
    factors: Sequence[float],
    success: Float[Tensor, "coefficients factors"],
    names: Sequence[str],
    *,
    ax: Axes | None = None,
) -> Figure | SubFigure:
    """Success rate against what a coefficient was multiplied by, a line for each coefficient.

    Args:
        factors: such as (1/4, 1/2, 1, 2, 4), 1 being the settings' own.
        success: share of runs that succeed, from 0 to 1.
        names: of the coefficients.

    Raises:
        InvalidSetting: factors that do not rise from above 0, another number of them than in `success`, or of names.
    """
    if len(factors) != success.shape[1] or factors[0] <= 0 or list(factors) != sorted(set(factors)):
        raise InvalidSetting(f"Expected {success.shape[1]} factors that rise from above 0, got {list(factors)}.")
    check_names(names, len(success), "coefficient")
    ax = axes(ax, 7.0)
    for row, (name, colour, line) in enumerate(zip(names, colours(len(names)), plain(success), strict=True)):
        nudge = 1.025 ** (row - (len(names) - 1) / 2)  # so that lines of the same height are all seen
        marker = "osD^vP*X"[row % 8]
        ax.plot([factor * nudge for factor in factors], line.numpy(), color=colour, marker=marker, label=name)
    ax.axvline(1, color=NULL, linestyle=":", linewidth=1, zorder=0)
    ax.set_xscale("log", base=2)
    ax.set_xticks(factors, [f"×{factor:g}" for factor in factors])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set(ylim=(-0.03, 1.05), xlabel="coefficient, times its setting", ylabel="runs that succeed")
    ax.set_title("How exactly must coefficients be chosen?")
    grid(ax)
    legend(ax)
    return ax.figure


@checked
def components_by_feature(
    rows: Float[Tensor, "n_features d"], components: Float[Tensor, "C n_features d"]
) -> list[int]:
    """Components by the first feature whose best one they are (see `apd_lens.metrics.best_components`), then all
    others, largest norm first."""
    best = dict.fromkeys(metrics.best_components(rows, components).tolist())
    by_norm = components.flatten(1).norm(dim=1).argsort(descending=True).tolist()
    return [*best, *(component for component in by_norm if component not in best)]


@checked
def feature_vectors(rows: Float[Tensor, "n_features d"], components: Float[Tensor, "C n_features d"]) -> Figure:
    """A matrix's row for each feature, of the target and of the components.

    In two dimensions as arrows: the target's, those of all components together, and a panel for each component, over
    the target's in grey; components without any arrow to speak of are left out. In more dimensions as images: the
    target's rows; for every feature the row of its best component; and the norm of every component's row, over that of
    the target's, which is one dark cell in each line and column where each feature has a component of its own.

    Args:
        rows: row i of the target's matrix, what it has of feature i. What the paper calls columns.
        components: the components' weights in that matrix, as of `ParameterComponents.component_weights`.

    Source: the paper's toy models of superposition.
    """
    rows, components = plain(rows), plain(components)
    order = components_by_feature(rows, components)
    return (_arrows if rows.shape[1] == 2 else _row_images)(rows, components, order)


def _arrows(
    rows: Float[Tensor, "n_features 2"], components: Float[Tensor, "C n_features 2"], order: list[int]
) -> Figure:
    longest = components.norm(dim=2).max(1).values
    drawn = [component for component in order if longest[component] > _EMPTY * rows.norm(dim=1).max()]
    titles = ["target", "sum of components", *(f"component {component}" for component in drawn)]
    figure, axes = panels(len(titles), min(len(titles), 7), 1.9, 2.1)
    of_features = colours(len(rows))
    for ax, title, vectors in zip(axes, titles, [rows, components.sum(0), *components[drawn]], strict=True):
        if title != "target":
            _quiver(ax, rows, ["0.85"] * len(rows))
        _quiver(ax, vectors, of_features)
        for feature, vector in enumerate(vectors):
            if vector.norm() > 0.25 * rows.norm(dim=1).max():
                x, y = (1.14 * vector).tolist()
                ax.text(x, y, str(feature), ha="center", va="center", fontsize=8)
        ax.set_title(title, fontsize=10)
        ax.set_aspect("equal")
        ax.axhline(0, color="0.9", linewidth=0.6, zorder=0)
        ax.axvline(0, color="0.9", linewidth=0.6, zorder=0)
    reach = 1.25 * max(rows.norm(dim=1).max().item(), longest.max().item())
    axes[0].set(xlim=(-reach, reach), ylim=(-reach, reach))
    figure.suptitle(f"Row of W for each of {len(rows)} features{_left_out(len(order) - len(drawn))}")
    figure.supxlabel("hidden dimension 0", fontsize=10)
    figure.supylabel("hidden dimension 1", fontsize=10)
    return figure


def _left_out(n: int) -> str:
    return f"; {n} empty component{'s' * (n > 1)} not drawn" if n else ""


def _quiver(ax: Axes, vectors: Float[Tensor, "n 2"], of_vectors: Sequence[str]) -> None:
    x, y = vectors.T.numpy()
    origin = torch.zeros(len(vectors), dtype=torch.float32, device="cpu").numpy()
    ax.quiver(
        origin,
        origin,
        x,
        y,
        color=of_vectors,
        angles="xy",
        scale_units="xy",
        scale=1,
        width=0.02,
        minlength=0,
        zorder=2,
    )


def _row_images(
    rows: Float[Tensor, "n_features d"], components: Float[Tensor, "C n_features d"], order: list[int]
) -> Figure:
    best = metrics.best_components(rows, components)
    matched = components[best, torch.arange(len(rows), device="cpu")]
    norms = components[order].norm(dim=2).T / rows.norm(dim=1, keepdim=True)
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(13, 5.2), width_ratios=(1, 1, 1.8), layout="constrained"
    )
    largest = torch.stack([rows, matched]).abs().max().item()
    for ax, values, title in ((left, rows, "target"), (middle, matched, "component of each feature")):
        image(ax, values, "weight", signed=True).set_clim(-largest, largest)
        ax.set(xlabel="hidden dimension", ylabel="feature", title=title)
    image(right, norms, "‖row of the component‖ / ‖row of the target‖")
    n_matched = len(set(best.tolist()))
    right.set(xlabel=f"component (sorted; the first {n_matched} are some feature's best)", title="all components")
    right.set_ylabel("feature")
    figure.suptitle("Row of W for each feature")
    return figure


@checked
def neuron_contributions(
    target: Float[Tensor, "n_features neurons"],
    components: Float[Tensor, "C n_features neurons"],
    *,
    component_of: Int[Tensor, " n_features"] | None = None,
) -> Figure:
    """How much each neuron does for each feature: in the target above, in the feature's component below.

    One dot for each feature and neuron, coloured by neuron. The three largest of each feature carry the neuron's
    number, unless they are below a quarter of the largest of all.

    Args:
        target, components: from `apd_lens.metrics.neuron_contributions`.
        component_of: the component of each feature; default the one whose contributions have the largest cosine with
            the target's.

    Raises:
        InvalidSetting: `component_of` names a component that does not exist.

    Source: the paper's figure of neuron contributions in the residual MLP.
    """
    target, components = plain(target), plain(components)
    n_features, n_neurons = target.shape
    best = metrics.best_components(target, components) if component_of is None else component_of.cpu()
    if not 0 <= best.min() <= best.max() < len(components):
        raise InvalidSetting(f"component_of must hold numbers from 0 to {len(components) - 1}, got {best.tolist()}.")
    own = components[best, torch.arange(n_features, device="cpu")]

    figure, both = plt.subplots(
        2, 1, sharex=True, sharey=True, layout="constrained", figsize=(max(7.0, 0.17 * n_features), 5.6)
    )
    features = torch.arange(n_features, device="cpu").repeat_interleave(n_neurons).numpy()
    of_dots = colours(n_neurons) * n_features
    large = 0.25 * torch.stack([target, own]).abs().max()
    for ax, values, title in zip(both, (target, own), ("target", "component of each feature"), strict=True):
        for end in range(0, n_features, 2):
            ax.axvspan(end - 0.5, end + 0.5, color="0.96", zorder=0)
        ax.axhline(0, color="0.7", linewidth=0.8, zorder=1)
        ax.scatter(features, values.flatten().numpy(), s=9, c=of_dots, zorder=2)
        for feature, neuron in _largest(values, large):
            ax.annotate(
                str(neuron),
                (feature, values[feature, neuron].item()),
                xytext=(2.5, 0),
                textcoords="offset points",
                va="center",
                fontsize=6,
            )
        ax.set(title=title, ylabel="contribution")
        ax.set_xlim(-0.7, n_features - 0.2)
    step = max(1, n_features // 25)
    names = [f"{i}\n({best[i]})" for i in range(0, n_features, step)]
    both[1].set_xticks(range(0, n_features, step), names, fontsize=8)
    both[1].set_xlabel("input feature (its component)")
    figure.suptitle(f"What each of {n_neurons} neurons does for each feature, from its input to its own output")
    return figure


def _largest(values: Float[Tensor, "n_features neurons"], above: Tensor, n: int = 3) -> list[tuple[int, int]]:
    """Feature and neuron of the n largest values of each feature that are above the given size."""
    neurons = values.abs().topk(min(n, values.shape[1])).indices.tolist()
    return [
        (feature, neuron)
        for feature, row in enumerate(neurons)
        for neuron in row
        if values[feature, neuron].abs() > above
    ]


@checked
def component_graph(
    W_in: Sequence[Float[Tensor, "C d_resid _"]],
    W_out: Sequence[Float[Tensor, "C _ d_resid"]],
    *,
    residual_names: Sequence[str] | None = None,
    component_names: Sequence[str] | None = None,
    threshold: float = 0.05,
    ax: Axes | None = None,
) -> Figure | SubFigure:
    """Which component owns which neuron, and what it connects it to: a graph of the MLPs of a residual stream.

    Nodes are the entries of the stream that are read (left), the neurons of every layer, and the entries that are
    written (right). Edges are weights of components, coloured by component, as wide as they are large, dashed where
    negative. A neuron is coloured by the component that holds most of its squared weight, and sorted by it. That a
    later layer may read what an earlier one wrote is not drawn.

    Args:
        W_in, W_out: the components' weights in every layer, as of `ParameterComponents.component_weights`.
        residual_names: of the entries of the stream; default their numbers.
        component_names: default their numbers.
        threshold: weights below this share of the largest in all W_in, or in all W_out, are not drawn.

    Raises:
        InvalidSetting: no layers, or not one W_out for each W_in; or another number of names.
        ShapeMismatch: layers of another C or d_resid than the first.

    Source: the paper's hand-coded gated functions.
    """
    if not W_in or len(W_in) != len(W_out):
        raise InvalidSetting(f"Expected a W_out for each W_in, got {len(W_in)} W_in and {len(W_out)} W_out.")
    n_components, d_resid, _ = W_in[0].shape
    for layer, (read, written) in enumerate(zip(W_in, W_out, strict=True)):
        n_neurons = read.shape[2]
        expected = (n_components, d_resid, n_neurons), (n_components, n_neurons, d_resid)
        if (read.shape, written.shape) != expected:
            raise ShapeMismatch(
                f"Expected W_in and W_out of layer {layer} of shapes {expected[0]} and {expected[1]}, got "
                f"{tuple(read.shape)} and {tuple(written.shape)}."
            )
    residual_names = [str(i) for i in range(d_resid)] if residual_names is None else residual_names
    component_names = [f"component {c}" for c in range(n_components)] if component_names is None else component_names
    check_names(residual_names, d_resid, "entry of the residual stream")
    check_names(component_names, n_components, "component")
    reads, writes = ([plain(W) for W in side] for side in (W_in, W_out))
    reads, writes = _over_largest(reads), _over_largest(writes)
    strengths = [_strength(read, written) for read, written in zip(reads, writes, strict=True)]

    n_neurons = sum(strength.shape[1] for strength in strengths)
    ax = axes(ax, 8.0, max(4.0, 0.17 * n_neurons))
    of_components = colours(n_components)
    read_from = _used(reads, 1, threshold)
    written_to = _used(writes, 2, threshold)
    height = n_neurons + 3 * (len(strengths) - 1)
    left = _spread(read_from, 0.0, height)
    right = _spread(written_to, 2.0, height)
    top = height
    for layer, (read, written, strength) in enumerate(zip(reads, writes, strengths, strict=True)):
        owner = strength.argmax(0)
        order = owner.argsort(stable=True).tolist()
        places = {neuron: (1.0, top - 0.5 - place) for place, neuron in enumerate(order)}
        _edges(ax, read.mT, places, left, of_components, threshold)
        _edges(ax, written, places, right, of_components, threshold)
        x, y = zip(*places.values(), strict=True)
        used = strength.amax(0)[order] > threshold**2
        fill = [of_components[owner[neuron]] if on else "white" for neuron, on in zip(order, used, strict=True)]
        ax.scatter(x, y, s=34, c=fill, edgecolors=TARGET, linewidths=0.6, zorder=3)
        white = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        ax.text(1.0, top + 0.2, f"layer {layer}", ha="center", va="bottom", fontsize=9, bbox=white, zorder=2)
        top -= len(order) + 3
    for ends, side in ((left, "right"), (right, "left")):
        for entry, (x, y) in ends.items():
            ax.scatter([x], [y], s=60, c="white", edgecolors=TARGET, zorder=3)
            offset = (-7, 0) if side == "right" else (7, 0)
            ax.annotate(residual_names[entry], (x, y), xytext=offset, textcoords="offset points", ha=side, va="center")
    ax.margins(x=0.1)
    ax.set_ylim(-0.5, height + 2.5)
    ax.set_axis_off()
    ax.set_title("What each component reads, which neurons it owns and where it writes")
    handles = [
        Line2D([], [], color=of_components[c], linewidth=2, label=component_names[c]) for c in range(n_components)
    ]
    handles += [Line2D([], [], color=NULL, linestyle="--", label="negative")]
    legend(ax, handles=handles, ncols=1 + n_components // 25)
    return ax.figure


def _over_largest(weights: Sequence[Tensor]) -> list[Tensor]:
    """The weights over the largest of all."""
    largest = max(W.abs().max().item() for W in weights)
    return [W / (largest or 1.0) for W in weights]


def _strength(
    read: Float[Tensor, "C d_resid neurons"], written: Float[Tensor, "C neurons d_resid"]
) -> Float[Tensor, "C neurons"]:
    """Squared weight of each component in each neuron."""
    return read.square().sum(1) + written.square().sum(2)


def _used(weights: Sequence[Tensor], axis: int, threshold: float) -> list[int]:
    """Entries of the residual stream, on the given axis of `C ...` weights, that an edge leads to."""
    others = tuple({0, 1, 2} - {axis})
    largest = torch.stack([W.abs().amax(others) for W in weights]).amax(0)
    return (largest > threshold).nonzero()[:, 0].tolist()


def _spread(entries: list[int], x: float, height: float) -> dict[int, tuple[float, float]]:
    """Places one above the other, the first at the top."""
    return {entry: (x, height * (1 - (i + 0.5) / len(entries))) for i, entry in enumerate(entries)}


def _edges(
    ax: Axes,
    weights: Float[Tensor, "C neurons d_resid"],
    neurons: dict[int, tuple[float, float]],
    entries: dict[int, tuple[float, float]],
    of_components: Sequence[str],
    threshold: float,
) -> None:
    """Lines between neurons and entries of the stream, as wide as the weights, of which the largest anywhere is 1."""
    chosen = (weights.abs() > threshold).nonzero().tolist()
    sizes = [weights[c, neuron, entry].item() for c, neuron, entry in chosen]
    ax.add_collection(
        LineCollection(
            [(neurons[neuron], entries[entry]) for _, neuron, entry in chosen],
            colors=[of_components[c] for c, _, _ in chosen],
            linewidths=[0.3 + 2.2 * abs(size) for size in sizes],
            linestyles=["-" if size > 0 else "--" for size in sizes],
            alpha=0.8,
            zorder=1,
        )
    )
