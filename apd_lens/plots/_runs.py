"""What happens in a training run, and over seeds."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from torch import Tensor

from apd_lens._checks import checked
from apd_lens._errors import InvalidSetting
from apd_lens._table import short_names
from apd_lens.plots._draw import (
    NULL,
    POSITIVE,
    TARGET,
    axes,
    check_names,
    colours,
    finished,
    from_zero,
    legend,
    plain,
    several,
    whole_numbers,
)
from apd_lens.training._state import StepInfo

# One entry a step that was kept: what `on_step` is called with, or name -> value.
History = Sequence[StepInfo] | Sequence[Mapping[str, float | Tensor]]
_NOT_LOSSES = ("step", "alive", "moves")


@checked
def loss_curves(history: History, *, ax: Axes | None = None) -> Figure | SubFigure:
    """Every loss term, without its coefficient, against the step on a log axis.

    Faint lines are the values, strong lines are means over windows of steps, 100 in all. A term that was not computed
    at a step, or was zero, has a gap there.

    Args:
        history: `StepInfo`s, or dicts name -> value of a term. A dict's "step" says which step it is of (default its
            place); its "alive" and "moves" are not drawn.

    Raises:
        InvalidSetting: an empty history, or one without any term.
    """
    entries = _entries(history)
    names = list(dict.fromkeys(name for entry in entries for name in entry if name not in _NOT_LOSSES))
    if not names:
        raise InvalidSetting("The history holds no loss term. Give StepInfo, or dicts name -> value of a term.")
    ax = axes(ax, 7.5)
    steps = [entry["step"] for entry in entries]
    for name, colour in zip(names, colours(len(names)), strict=True):
        values = torch.tensor([entry.get(name, torch.nan) for entry in entries], dtype=torch.float32, device="cpu")
        values[values <= 0] = torch.nan
        width = -(-len(values) // 100)
        if width > 1:
            ax.plot(steps, values.numpy(), color=colour, linewidth=0.6, alpha=0.3)
        middle, means = (
            _means(series, width) for series in (torch.tensor(steps, dtype=torch.float64, device="cpu"), values)
        )
        ax.plot(middle.numpy(), means.numpy(), color=colour, linewidth=1.6, label=name)
    ax.set(yscale="log", xlabel="step", ylabel="loss term, without its coefficient", title="Loss terms in training")
    return finished(ax)


@checked
def alive_components(history: History, *, ax: Axes | None = None) -> Figure | SubFigure:
    """Number of components that were active in the last 100 steps, against the step, with moves marked.

    Args:
        history: `StepInfo`s, of which at least all with moves should be there; or dicts with "alive", and if you like
            with "step" (default its place) and "moves", the number of moves made after the step.

    Raises:
        InvalidSetting: an empty history, or a dict without "alive".
    """
    entries = _entries(history)
    if any("alive" not in entry for entry in entries):
        raise InvalidSetting('Each entry of the history needs "alive", the number of components that are alive.')
    ax = axes(ax, 7.5)
    first, steps = history[0], [entry["step"] for entry in entries]
    moves = {entry["step"]: int(entry["moves"]) for entry in entries if entry.get("moves")}
    if moves:
        label = f"moves, {sum(moves.values())} in all"
        marks = ax.vlines(list(moves), 0, 1, transform=ax.get_xaxis_transform(), color="0.85", linewidth=0.8)
        marks.set(label=label, zorder=0)
    if isinstance(first, StepInfo):
        n_components = len(first.last_active)
        ax.axhline(n_components, color=NULL, linestyle=":", label=f"all {n_components}")
    ax.plot(steps, [entry["alive"] for entry in entries], color=TARGET, drawstyle="steps-post", label="alive")
    ax.set(xlabel="step", ylabel="components", title="Components active in the last 100 steps")
    from_zero(ax)
    whole_numbers(ax.yaxis)
    ax.spines[["top", "right"]].set_visible(False)
    legend(ax)
    return ax.figure


def _entries(history: History) -> list[dict[str, float]]:
    """The history as numbers, each entry with its step."""
    if not history:
        raise InvalidSetting("The history is empty. Collect one with decompose(..., on_step=...).")
    entries = []
    for place, entry in enumerate(history):
        if isinstance(entry, StepInfo):
            entry = {"step": entry.step, "alive": entry.alive, "moves": entry.moves, **entry.terms}
        entries.append({"step": place} | {name: torch.as_tensor(value).item() for name, value in entry.items()})
    return entries


def _means(values: Float[Tensor, " n"], width: int) -> Float[Tensor, " n_means"]:
    """Means of so many values at a time that are not NaN; the last may be of fewer."""
    return torch.stack([part.nanmean() for part in values.split(width)])


@checked
def seed_stability(
    similarity: Float[Tensor, "matrices seeds seeds"],
    null: Float[Tensor, "matrices seeds"],
    *,
    names: Sequence[str] | None = None,
    ax: Iterable[Axes] | None = None,
) -> Figure | SubFigure:
    """Similarity of the components of several seeds: one image for each matrix, seeds by seeds, above the null control.

    Args:
        similarity: [l, i, j] is how well seed j's components have those of seed i in matrix l, such as the MMCS.
            A further "matrix" may be all of them as one.
        null: [l, j] is the same of seed j with random components.
        names: names of the matrices, which are shortened; default their indices.
        ax: one for each matrix; a new figure has a title above them.

    Raises:
        InvalidSetting: not as many names, or axes, as matrices.
    """
    n_matrices, n_seeds, _ = similarity.shape
    names = [f"matrix {i}" for i in range(n_matrices)] if names is None else names
    check_names(names, n_matrices, "matrix")
    names = short_names(names)
    similarity, null = plain(similarity), plain(null)
    side = max(2.4, 0.42 * n_seeds)
    figure, drawn = several(ax, n_matrices, ncols=n_matrices, figsize=(side * n_matrices + 1.4, side + 1.0))
    gap = torch.full((1, n_seeds), torch.nan, dtype=torch.float32, device="cpu")
    for place, name, values, null_row in zip(drawn, names, similarity, null, strict=True):
        rows = torch.cat([values, gap.to(values), null_row[None]])
        place.imshow(rows.numpy(), cmap=POSITIVE, vmin=0, vmax=1, interpolation="nearest")
        for i, j in rows.isfinite().nonzero().tolist() if n_seeds <= 10 else ():
            value = rows[i, j].item()
            place.text(
                j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if value > 0.6 else TARGET
            )
        ticks = range(0, n_seeds, max(1, n_seeds // 10))
        place.set_xticks(ticks)
        place.set_yticks([*ticks, n_seeds + 1], [*map(str, ticks), "null"])
        place.set(title=name, xlabel="seed j")
    drawn[0].set_ylabel("seed i")
    figure.colorbar(drawn[-1].images[0], ax=drawn[-1], label="similarity", fraction=0.05, pad=0.03)
    if ax is None:
        figure.suptitle("Do seeds find the same components?")
    return figure
