"""Figures of decompositions. Each function draws on the axes it is given, or on a new figure, and returns the figure.

Needs matplotlib: pip install 'apd-lens[plots]'.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from apd_lens._errors import MissingExtra

try:
    from matplotlib import pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
except ImportError as error:
    raise MissingExtra("apd_lens.plots needs matplotlib. Install it with pip install 'apd-lens[plots]'") from error


def sorted_components(attributions: Float[Tensor, "data C"]) -> list[int]:
    """Components by the first data point for which each is the top one; those that never are come last, strongest
    first."""
    top = attributions.argmax(1).tolist()
    first_held = {component: data_point for data_point, component in reversed(list(enumerate(top)))}
    peak = attributions.max(0).values.tolist()
    return sorted(range(attributions.shape[1]), key=lambda c: (first_held.get(c, len(top)), -peak[c]))


def attribution_matrix(
    attributions: Float[Tensor, "data C"],
    *,
    ax: Axes | None = None,
    data_name: str = "data point",
) -> Figure | SubFigure:
    """Attributions as an image, data points down, components across in the order of `sorted_components`.

    Each row is divided by its largest entry, so that a data point that one component serves alone has one dark cell.
    """
    ax = plt.subplots(layout="constrained")[1] if ax is None else ax
    order = sorted_components(attributions)
    rows = attributions / attributions.max(1, keepdim=True).values.clamp_min(torch.finfo(attributions.dtype).tiny)
    image = ax.imshow(rows[:, order].cpu().numpy(), cmap="BuPu", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    n_alive = len(set(attributions.argmax(1).tolist()))
    if n_alive < len(order):
        ax.axvline(n_alive - 0.5, color="0.6", linewidth=1, linestyle=":")
    ax.set(
        xlabel=f"component (sorted; the last {len(order) - n_alive} are never active)",
        ylabel=data_name,
        title="attribution, as a share of the row's largest",
    )
    ax.figure.colorbar(image, ax=ax, fraction=0.04, pad=0.02)
    return ax.figure


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
    ax = plt.subplots(layout="constrained")[1] if ax is None else ax
    order = list(range(len(share))) if order is None else order
    image = ax.imshow(share[order].T.cpu().numpy(), cmap="BuPu", vmin=0, interpolation="nearest", aspect="auto")
    ax.set(xlabel="component (same order)", ylabel=unit_name, title=f"share of each {unit_name}'s squared weight")
    ax.figure.colorbar(image, ax=ax, fraction=0.04, pad=0.02)
    return ax.figure
