"""Which components matter where."""

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from torch import Tensor

from apd_lens._checks import checked
from apd_lens.plots._draw import axes, image, plain


@checked
def sorted_components(attributions: Float[Tensor, "data C"]) -> list[int]:
    """Components in the order of the first data point on which each is the top one. Those that never are come last,
    strongest first."""
    top = attributions.argmax(1).tolist()
    first_held = {component: data_point for data_point, component in reversed(list(enumerate(top)))}
    peak = attributions.max(0).values.tolist()
    return sorted(range(attributions.shape[1]), key=lambda c: (first_held.get(c, len(top)), -peak[c]))


@checked
def attribution_matrix(
    attributions: Float[Tensor, "data C"],
    *,
    ax: Axes | None = None,
    data_name: str = "data point",
) -> Figure | SubFigure:
    """Attributions as an image, with data points down and components across, in the order of `sorted_components`.

    Each row is divided by its largest entry, so a data point that one component serves alone has one dark cell.
    Components right of the dotted line are never the top one.
    """
    ax, attributions = axes(ax), plain(attributions)
    order = sorted_components(attributions)
    rows = attributions / attributions.max(1, keepdim=True).values.clamp_min(torch.finfo(attributions.dtype).tiny)
    image(ax, rows[:, order], "attribution / largest of the row")
    n_never = len(order) - len(set(attributions.argmax(1).tolist()))
    if n_never:
        ax.axvline(len(order) - n_never - 0.5, color="0.6", linewidth=1, linestyle=":")
    never = f", the last {n_never} are never the largest" if n_never else ""
    ax.set(xlabel=f"component (sorted{never})", ylabel=data_name, title="Attribution of each component")
    return ax.figure
