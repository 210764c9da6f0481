"""What the figures share: tensors that can be drawn, axes, colours, legends."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from apd_lens._errors import InvalidSetting, ShapeMismatch

# Okabe and Ito 2008, "Color universal design", without black (the target's) and yellow (too pale for lines).
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
TARGET, LABEL, NULL = "0.1", "0.8", "0.55"
SPARSE, SCRUBBED, ANTI_SCRUBBED = PALETTE[0], PALETTE[2], PALETTE[3]
POSITIVE, SIGNED = "BuPu", "RdBu_r"


def plain(values: Shaped[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The values on the CPU, without a graph, as floats of 32 bits or more."""
    return values.detach().to("cpu", torch.promote_types(values.dtype, torch.float32))


def plain_curves(curves: Mapping[str, Tensor], like: Tensor) -> dict[str, Tensor]:
    """Named curves, each of which must have the shape of `like`."""
    for name, curve in curves.items():
        if curve.shape != like.shape:
            raise ShapeMismatch(f"Expected {name!r} of shape {tuple(like.shape)}, got {tuple(curve.shape)}.")
    return {name: plain(curve) for name, curve in curves.items()}


def check_names(names: Sequence[str], n: int, what: str) -> None:
    """Raises InvalidSetting unless there are as many names as things to be named."""
    if len(names) != n:
        raise InvalidSetting(f"Expected {n} names, one for each {what}, got {list(names)}.")


def axes(ax: Axes | None, width: float = 6.4, height: float = 4.0) -> Axes:
    """The given axes, or those of a new figure; sizes in inches."""
    return plt.subplots(figsize=(width, height), layout="constrained")[1] if ax is None else ax


def several(ax: Iterable[Axes] | None, n: int, **new: Any) -> tuple[Figure | SubFigure, list[Axes]]:
    """The n given axes, or those of a new figure that `new` describes.

    Raises:
        InvalidSetting: other than n axes.
    """
    if ax is None:
        figure, drawn = plt.subplots(layout="constrained", squeeze=False, **new)
        return figure, list(drawn.flat)
    given = list(ax)
    if len(given) != n:
        raise InvalidSetting(f"This figure has {n} plots: expected ax= of {n} axes, got {len(given)}.")
    return given[0].figure, given


def panels(n: int, n_columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A new figure with n panels of one size in inches, in rows; with common axes."""
    n_rows = math.ceil(n / n_columns)
    size = (n_columns * width, n_rows * height + 0.6)
    figure, grid = plt.subplots(
        n_rows, n_columns, figsize=size, layout="constrained", sharex=True, sharey=True, squeeze=False
    )
    for spare in grid.flat[n:]:
        spare.remove()
    return figure, list(grid.flat[:n])


def colours(n: int) -> list[str]:
    """n colours for things of one kind: the palette, or beyond it steps of a map whose lightness rises."""
    if n <= len(PALETTE):
        return list(PALETTE[:n])
    return [to_hex(colormaps["viridis"](0.92 * i / (n - 1))) for i in range(n)]


def image(
    ax: Axes, values: Float[Tensor, "down across"], label: str, *, signed: bool = False, largest: float | None = None
) -> AxesImage:
    """Values as an image with a colour bar: from 0 up, or around 0, to the largest that there is or that is given."""
    largest = largest or max(values.abs().max().item(), torch.finfo(values.dtype).tiny)
    shown = ax.imshow(
        values.numpy(),
        cmap=SIGNED if signed else POSITIVE,
        vmin=-largest if signed else 0,
        vmax=largest,
        interpolation="nearest",
        aspect="auto",
    )
    whole_numbers(ax.xaxis, ax.yaxis)
    ax.figure.colorbar(shown, ax=ax, label=label, fraction=0.04, pad=0.02, aspect=40)
    return shown


def from_zero(ax: Axes) -> None:
    """The y axis from 0, with room above what is highest."""
    ax.set_ylim(0, 1.05 * ax.dataLim.ymax)


def whole_numbers(*lines: Axis) -> None:
    """Ticks of an x or y axis at whole numbers only."""
    for line in lines:
        line.set_major_locator(MaxNLocator(9, integer=True, steps=[1, 2, 5, 10]))


def legend(ax: Axes, **options: object) -> None:
    """A legend to the right of the axes, where no data is."""
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0, frameon=False, **options)


def grid(ax: Axes) -> None:
    """Faint lines behind the data, no frame on the right and above."""
    ax.grid(color="0.92", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def finished(ax: Axes) -> Figure | SubFigure:
    """The figure, with lines behind the data and a legend."""
    grid(ax)
    legend(ax)
    return ax.figure
