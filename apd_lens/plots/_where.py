"""Where a behaviour is: effects by matrix and position."""

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from apd_lens._checks import checked
from apd_lens._errors import InvalidSetting
from apd_lens.plots._draw import axes, image
from apd_lens.scan._result import Where


@checked
def where(result: Where, *, at_least: float = 0.02, top: int = 40, ax: Axes | None = None) -> Figure | SubFigure:
    """Effect of each matrix at each position as an image, with matrices down in the order of the forward pass.

    A cell with a number was measured; one without was estimated. A star marks the places that `Where.best` chooses by.
    Red takes from the metric when it is ablated, blue adds to it.

    Args:
        result: from `apd_lens.where`.
        at_least: rows are shown whose largest effect is this share of the largest of all; a row with a measured effect
            counts by that.
        top: rows that are shown at most, those with the largest effects.

    Raises:
        InvalidSetting: no effect is as large.
    """
    values = torch.where(result.measured.isnan(), result.estimated, result.measured).nan_to_num()
    is_measured = ~result.measured.isnan()
    of_measured = result.measured.nan_to_num().abs().amax(1)
    sizes = torch.where(is_measured.any(1), of_measured, values.abs().amax(1))
    rows = [row for row in sizes.argsort(descending=True).tolist() if sizes[row] >= at_least * sizes.max() > 0]
    rows = sorted(rows[:top])
    if not rows:
        raise InvalidSetting("No effect can be drawn: all are 0, or at_least= or top= leaves none.")
    shown, labels = values[rows], result.labels()
    width = 3.2 + 0.085 * max(len(labels[row]) for row in rows) + 0.62 * len(result.groups)
    ax = axes(ax, min(14.0, max(5.0, width)), min(14.0, max(2.6, 1.4 + 0.23 * len(rows))))
    unit = f" ({result.unit})" if result.unit else ""
    image(ax, shown, f"metric lost when ablated{unit}", signed=True)
    chosen = {place for each in result.together for place in each.fewest(0.9)}
    for down, row in enumerate(rows):
        for across in range(len(result.groups)):
            if not is_measured[row, across]:
                continue
            is_dark = abs(float(shown[down, across])) > 0.6 * float(shown.abs().max())
            star = "★" if (row, across) in chosen else ""
            ax.text(
                across,
                down,
                f"{star}{float(shown[down, across]):.2f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if is_dark else "0.15",
            )
    ax.set_yticks(range(len(rows)), [labels[row] for row in rows], fontsize=8)
    is_long = sum(map(len, result.groups)) > 12 * len(result.groups) or len(result.groups) > 10
    ax.set_xticks(range(len(result.groups)), result.groups, fontsize=8, rotation=90 if is_long else 0)
    ax.set(xlabel="position", title="Where the behaviour is")
    return ax.figure
