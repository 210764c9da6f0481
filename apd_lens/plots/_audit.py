"""What "inactive" is worth: an audit's losses beside their nulls."""

import math
from collections.abc import Iterable

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import NullLocator

from apd_lens._checks import checked
from apd_lens._errors import InvalidSetting
from apd_lens.metrics._audit import WORST_FOR_ALL, WORST_OF_EACH, Audit
from apd_lens.plots._draw import NULL, PALETTE, finished, grid, several

# What is so much smaller than the largest value is drawn as nothing.
_SMALLEST = 1e-7
_ATTACKS = {WORST_OF_EACH: (PALETTE[1], "^", "each data point's own"), WORST_FOR_ALL: (PALETTE[3], "v", "one for all")}


@checked
def audit(audit: Audit, *, ax: Iterable[Axes] | None = None) -> Figure | SubFigure:
    """An audit: on the left the loss of each row as a dot, beside its nulls; on the right the attack against its steps.

    Of each attack the last rung alone is on the left. Losses are on a log axis; those below 1e-7 of the largest one are
    at its lower end, infinite ones at its upper end.

    Args:
        audit: a result of `apd_lens.metrics.audit`.
        ax: two axes, left and right.

    Raises:
        InvalidSetting: no loss is above zero, or other than two axes.
    """
    columns = [column.tolist() for column in (audit.loss, audit.null, audit.random)]
    finite = [value for column in columns for value in column if math.isfinite(value)]
    if not finite or max(finite) <= 0:
        raise InvalidSetting("No loss of this audit is above zero, so there is nothing to draw.")
    highest = 3 * max(finite)
    lowest = max(min([value for value in finite if value > _SMALLEST * highest], default=highest) / 3, 1e-30)
    last = {what: row for row, what in enumerate(audit.what)}
    shown = [row for row, what in enumerate(audit.what) if what not in _ATTACKS or row == last[what]]
    first = {what: row for row, what in reversed(list(enumerate(audit.what)))}
    size = (13, 1.2 + 0.27 * len(shown))
    figure, (left, right) = several(ax, 2, ncols=2, figsize=size, width_ratios=(2, 1))
    looks = (
        (columns[0], "these components", {"color": PALETTE[0], "marker": "o", "s": 46, "zorder": 4}),
        (columns[1], "null: another data point's", {"color": NULL, "marker": "|", "s": 130, "linewidths": 2.5}),
        (columns[2], "null: random components", {"facecolors": "none", "edgecolors": NULL, "marker": "D", "s": 30}),
    )
    nulls = [first[what] if (what := audit.what[row]) in _ATTACKS else row for row in shown]  # of the first rung
    for values, label, look in looks:
        of_row = [values[row] for row in (nulls if values is columns[1] else shown)]
        drawn = [(_inside(value, lowest, highest), place) for place, value in enumerate(of_row) if value == value]
        left.scatter(*zip(*drawn, strict=True), label=label, clip_on=False, **look)
    left.set_yticks(range(len(shown)), [_name(audit, row) for row in shown])
    left.invert_yaxis()
    left.set(xscale="log", xlim=(lowest, highest), xlabel="loss (at the left end: or less)", title="The model on …")
    for what, (colour, marker, label) in _ATTACKS.items():
        steps, losses, null = audit.ladder(what)
        inside = [_inside(loss, lowest, highest) for loss in losses.tolist()]
        right.plot(steps, inside, color=colour, marker=marker, label=label)
        right.axhline(
            _inside(null, lowest, highest), color=colour, linestyle=":", label=f"{label}: null, {steps[0]} steps"
        )
        right.set_xscale("log")
        right.xaxis.set_minor_locator(NullLocator())
        right.set_xticks(steps, [str(n) for n in steps])
    for what, style in (("active ones alone", "--"), ("a random part of the others", "-.")):
        loss = _inside(columns[0][last[what]], lowest, highest)
        right.axhline(loss, color=PALETTE[0], linestyle=style, linewidth=1, label=what)
    right.set(yscale="log", ylim=(lowest, highest), xlabel="steps of the attack", title="The worst that was found")
    finished(right)
    grid(left)
    left.legend(loc="upper center", bbox_to_anchor=(0.3, -0.12), ncols=3, frameon=False)
    return figure


def _inside(value: float, lowest: float, highest: float) -> float:
    return min(max(value, lowest), highest)


def _name(audit: Audit, row: int) -> str:
    amount = audit.amount[row]
    return audit.what[row] if amount is None else f"{audit.what[row]}: {amount}"
