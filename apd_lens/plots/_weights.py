"""What the components are: their rows, neurons, connections, ranks and layers."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from torch import Tensor

from apd_lens import metrics
from apd_lens._checks import checked
from apd_lens._errors import InvalidSetting, ShapeMismatch
from apd_lens.plots._draw import (
    NULL,
    TARGET,
    axes,
    check_names,
    colours,
    from_zero,
    grid,
    image,
    legend,
    panels,
    plain,
    plt,
    whole_numbers,
)

# A component whose rows are all shorter than this share of the target's longest is as good as empty.
_EMPTY = 0.02


@checked
def unit_share(
    share: Float[Tensor, "C units"],
    *,
    order: list[int] | None = None,
    ax: Axes | None = None,
    unit_name: str = "unit",
) -> Figure | SubFigure:
    """Which component holds which share of each unit's weight, as an image: units down, components across.

    Args:
        share: from `output_share` or `input_share`, or a mean of such.
        order: of the components; default as they are numbered.
    """
    ax, share = axes(ax), plain(share)
    image(ax, (share if order is None else share[order]).T, "share")
    ax.set(xlabel="component (same order)", ylabel=unit_name, title=f"Share of each {unit_name}'s squared weight")
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


@checked
def rank_and_share(
    rank: Float[Tensor, "C matrices"],
    share: Float[Tensor, "C matrices"],
    *,
    names: Sequence[str] | None = None,
    order: list[int] | None = None,
) -> Figure:
    """Effective rank of every component in each matrix, and which share of its squared norm lies there.

    Ranks are drawn where the share is at least 1 %; elsewhere they are of noise. A dot is as large as the share.

    Args:
        rank: `effective_rank(singular_values(components, name))` for each matrix, stacked.
        share: from `apd_lens.metrics.layer_share`.
        names: of the matrices; default their numbers.
        order: of the components; default as they are numbered.
    """
    order = list(range(len(share))) if order is None else order
    names = [f"matrix {i}" for i in range(share.shape[1])] if names is None else names
    check_names(names, share.shape[1], "matrix")
    rank_shown, share_shown = plain(rank)[order].numpy(), plain(share)[order].numpy()
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(max(6.4, 0.1 * len(order) + 2), 5), sharex=True, layout="constrained"
    )
    x, bottom = np.arange(len(order)), np.zeros(len(order))
    for matrix, colour in enumerate(colours(len(names))):
        here = share_shown[:, matrix] >= 0.01
        sizes = 8 + 32 * share_shown[here, matrix]
        above.scatter(x[here], rank_shown[here, matrix], s=sizes, color=colour, label=names[matrix])
        below.bar(x, share_shown[:, matrix], bottom=bottom, width=0.9, color=colour)
        bottom = bottom + share_shown[:, matrix]
    above.set(ylabel="effective rank", title="Rank and place of each component")
    from_zero(above)
    below.set(
        ylabel="share of squared norm",
        ylim=(0, 1),
        xlabel="component" if order == sorted(order) else "component (sorted)",
    )
    for ax in (above, below):
        grid(ax)
        ax.margins(x=0.01)
    whole_numbers(below.xaxis)
    legend(above)
    return figure
