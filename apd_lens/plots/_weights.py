"""The components themselves: their rows, neurons, connections, ranks and layers."""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from torch import Tensor

from apd_lens._checks import checked
from apd_lens._table import short_names
from apd_lens.plots._draw import (
    axes,
    check_names,
    colours,
    from_zero,
    grid,
    image,
    legend,
    plain,
    several,
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
    """Each component's share of every unit's weight, as an image with units down and components across.

    Args:
        share: from `output_share` or `input_share`, or a mean of such.
        order: order of the components; default by index.
    """
    ax, share = axes(ax), plain(share)
    image(ax, (share if order is None else share[order]).T, "share")
    ax.set(xlabel="component (same order)", ylabel=unit_name, title=f"Share of each {unit_name}'s squared weight")
    return ax.figure


@checked
def rank_and_share(
    rank: Float[Tensor, "C matrices"],
    share: Float[Tensor, "C matrices"],
    *,
    names: Sequence[str] | None = None,
    order: list[int] | None = None,
    ax: Iterable[Axes] | None = None,
) -> Figure | SubFigure:
    """Effective rank of every component in each matrix, and the share of its squared norm there.

    Ranks are drawn where the share is at least 1 %; elsewhere they are of noise. A dot is as large as the share.

    Args:
        rank: `effective_rank(singular_values(components, name))` for each matrix, stacked.
        share: from `apd_lens.metrics.layer_share`.
        names: names of the matrices, which are shortened; default their indices.
        order: order of the components; default by index.
        ax: two axes, above and below.

    Raises:
        InvalidSetting: not as many names as matrices, or other than two axes.
    """
    order = list(range(len(share))) if order is None else order
    names = [f"matrix {i}" for i in range(share.shape[1])] if names is None else names
    check_names(names, share.shape[1], "matrix")
    names = short_names(names)
    rank_shown, share_shown = plain(rank)[order].numpy(), plain(share)[order].numpy()
    size = (max(6.4, 0.1 * len(order) + 2), 5)
    figure, (above, below) = several(ax, 2, nrows=2, figsize=size, sharex=True)
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
    for part in (above, below):
        grid(part)
        part.margins(x=0.01)
    whole_numbers(below.xaxis)
    legend(above)
    return figure
