"""Components beside circuits: in which heads they lie, how much of a metric they keep, how they push it."""

from collections.abc import Mapping, Sequence

from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from torch import Tensor

from apd_lens._checks import checked
from apd_lens.plots._draw import (
    ANTI_SCRUBBED,
    NULL,
    SCRUBBED,
    SPARSE,
    axes,
    check_names,
    finished,
    image,
    plain,
    plain_curves,
)

_MASKINGS = {
    "own": ("the rest off", {"color": SPARSE, "marker": "s", "markersize": 4, "linestyle": "--", "zorder": 3}),
    "random": ("the rest at random", {"color": SCRUBBED, "marker": "o", "markersize": 4}),
    "worst": ("the rest where it does most harm", {"color": ANTI_SCRUBBED, "marker": "^", "markersize": 8}),
    "shuffled": ("units in random order, the rest off", {"color": NULL, "linestyle": ":"}),
}


@checked
def component_nodes(
    shares: Float[Tensor, "C nodes"],
    nodes: Sequence[str],
    *,
    known: Sequence[str] = (),
    order: Sequence[int] | None = None,
    ax: Axes | None = None,
    measure: str = "weight",
) -> Figure | SubFigure:
    """In which heads (or layers, or matrices) components lie, as an image with nodes down and components across.

    Args:
        shares: from `ArchitectureMap.shares`.
        nodes: their names, from `ArchitectureMap.nodes`.
        known: nodes with bold names, such as those of a known circuit.
        order: the components to show, such as `Location.top`; default: all, sorted by the node in which most of each
            lies.
        measure: what the shares are of.
    """
    check_names(nodes, shares.shape[1], "node")
    shares = plain(shares)
    largest = shares.max(1)
    by_node = sorted(range(len(shares)), key=lambda c: (int(largest.indices[c]), -float(largest.values[c])))
    shown = by_node if order is None else list(order)
    ax = axes(ax, max(4.5, min(12.0, 2.4 + 0.16 * len(shown))), max(2.2, min(12.0, 1.1 + 0.24 * len(nodes))))
    image(ax, shares[shown].T, f"share of the component's {measure}")
    ax.set_yticks(range(len(nodes)), list(nodes))
    for label in ax.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in known else "normal")
    if len(shown) <= 40:
        ax.set_xticks(range(len(shown)), [str(c) for c in shown], fontsize=8)
        ax.set_xlabel("component")
    else:
        ax.set_xlabel("component (sorted by where it lies)" if order is None else "component (in the given order)")
    ax.set_title("Where components lie")
    return ax.figure


@checked
def faithfulness(
    kept: Int[Tensor, " sizes"],
    curves: Mapping[str, Tensor],
    *,
    unit: str = "component",
    ax: Axes | None = None,
) -> Figure | SubFigure:
    """Metric recovered against the number of units kept, under three maskings. Dotted lines mark none and all of it.

    Args:
        kept: numbers of units, from `FaithfulnessCurve.kept`.
        curves: "own", "random", "worst" and "shuffled", from `FaithfulnessCurve.curves`; others are drawn under their
            own names.
        unit: what is kept.
    """
    ax, numbers = axes(ax, 7.4), kept.cpu().numpy()
    for name, curve in plain_curves(curves, kept).items():
        label, look = _MASKINGS.get(name, (name, {}))
        ax.plot(numbers, curve.numpy(), label=label, **look)
    for level in (0.0, 1.0):
        ax.axhline(level, color="0.6", linewidth=1, linestyle=":")
    if int(kept.max()) > 12:
        ax.set_xscale("symlog", linthresh=1)
    ax.set(
        xlabel=f"{unit}s kept",
        ylabel="share of the metric recovered",
        title=f"How many {unit}s carry the metric?",
        xlim=(0, None),
    )
    return finished(ax)


@checked
def signed_by_position(
    by_position: Float[Tensor, "pos C"],
    *,
    components: Sequence[int] | None = None,
    positions: Sequence[str] | None = None,
    ax: Axes | None = None,
    metric: str = "metric",
) -> Figure | SubFigure:
    """Effect of each component on a metric at each position, as an image: red raises it, blue lowers it.

    Args:
        by_position: from `SignedAttributions.by_position`.
        components: which to show, and in which order; default: up to 24 that bring most, from the one that raises the
            metric most to the one that lowers it most.
        positions: names, such as tokens.
        metric: its name.
    """
    by_position = plain(by_position)
    if components is None:
        most = by_position.abs().sum(0).argsort(descending=True)[:24]
        components = most[by_position.sum(0)[most].argsort(descending=True)].tolist()
    components = list(components)
    width, height = 2.6 + 0.22 * len(by_position), 1.2 + 0.22 * len(components)
    ax = axes(ax, max(4.5, min(12.0, width)), max(2.2, min(12.0, height)))
    image(ax, by_position[:, components].T, f"change of the {metric}", signed=True)
    ax.set_yticks(range(len(components)), [str(c) for c in components], fontsize=8)
    if positions is not None:
        check_names(positions, len(by_position), "position")
        ax.set_xticks(range(len(positions)), list(positions), rotation=90, fontsize=8)
    ax.set(xlabel="position", ylabel="component", title=f"What raises and lowers the {metric}")
    return ax.figure
