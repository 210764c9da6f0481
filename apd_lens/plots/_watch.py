"""What edits do, and how well scores separate unusual inputs from usual ones."""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from torch import Tensor

from apd_lens._checks import checked
from apd_lens._errors import InvalidSetting
from apd_lens.metrics._auroc import auroc
from apd_lens.plots._draw import NULL, PALETTE, axes, check_names, colours, finished, plain, plain_curves


@checked
def edit_effects(
    kind: Sequence[str],
    on_target: Float[Tensor, "edits on_target_data"],
    other: Float[Tensor, "edits other_data"],
    *,
    distance: str = "KL divergence",
    ax: Axes | None = None,
) -> Figure | SubFigure:
    """Side effect against effect on target for each edit, on log axes; a good edit is at the top left.

    A marker is the mean over data points, and the line to its right ends at the other data's 99th percentile. Distances
    below a millionth of the largest are drawn there.

    Args:
        kind: of each edit; edits of one kind have one colour. Names that begin with "random" are drawn in grey.
        on_target, other: distance from the target's output, as in `apd_lens.compare.EditEffects`.

    Raises:
        InvalidSetting: not one kind for each edit, or distances that are all 0.
    """
    check_names(kind, len(on_target), "edit")
    on_target, other = plain(on_target).mean(1), plain(other)
    high = other.kthvalue(math.ceil(0.99 * other.shape[1]), dim=1).values
    largest = torch.cat([on_target, high]).max().item()
    if not largest > 0:
        raise InvalidSetting("Every distance is 0: no edit has an effect that could be drawn on a log axis.")
    least = 1e-6 * largest
    x, end, y = (values.clamp_min(least) for values in (other.mean(1), high, on_target))
    ax = axes(ax, 8.0, 4.4)
    kinds = list(dict.fromkeys(kind))
    shades = iter(colours(sum(not name.startswith("random") for name in kinds)))
    for name, marker in zip(kinds, "osD^vP*Xdh" * len(kinds), strict=False):
        colour = NULL if name.startswith("random") else next(shades)
        rows = [row for row, other_name in enumerate(kind) if other_name == name]
        ax.hlines(y[rows].numpy(), x[rows].numpy(), end[rows].numpy(), color=colour, linewidth=1, alpha=0.6)
        ax.scatter(x[rows].numpy(), y[rows].numpy(), s=36, color=colour, marker=marker, label=name, zorder=3)
    ax.set(
        xscale="log",
        yscale="log",
        xlabel=f"{distance} on other data: mean, to 99th percentile",
        ylabel=f"{distance} on target",
        title="What edits do, where they should and elsewhere",
    )
    return finished(ax)


@checked
def roc(
    scores: Mapping[str, Float[Tensor, " data"]], anomalous: Bool[Tensor, " data"], *, ax: Axes | None = None
) -> Figure | SubFigure:
    """Share of anomalous data points found against the share of false alarms, as the threshold of each score falls.

    Args:
        scores: name -> score of each data point, larger where it is more unusual; the AUROC stands in the legend.
            Names that begin with "random" or "shuffled" are drawn in grey.

    Raises:
        ShapeMismatch: scores of another number of data points.
        InvalidSetting: only anomalous data points, or none.
    """
    curves, odd = plain_curves(scores, anomalous), anomalous.cpu()
    areas = {name: auroc(values, odd) for name, values in curves.items()}
    ax = axes(ax, 7.0, 4.4)
    ax.plot([0, 1], [0, 1], color=NULL, linestyle=":", linewidth=1)
    nulls = [name for name in curves if name.startswith(("random", "shuffled"))]
    shades = iter(colours(len(curves) - len(nulls)))
    for name, values in curves.items():
        ranks = values.unique(return_inverse=True)[1]
        n = int(ranks.max()) + 1
        # From the highest score down: how many of each lie at or above it.
        found, alarms = (
            F.pad(ranks[some].bincount(minlength=n).flip(0).cumsum(0) / some.sum(), (1, 0)) for some in (odd, ~odd)
        )
        ax.plot(
            alarms.numpy(),
            found.numpy(),
            color=NULL if name in nulls else next(shades),
            linestyle=("--", "-.", (0, (1, 1)))[nulls.index(name) % 3] if name in nulls else "-",
            linewidth=1.6,
            label=f"{name}, {areas[name]:.3f}",
        )
    ax.set(
        xlabel="share of normal data points above the threshold",
        ylabel="share of anomalous ones",
        title="Finding anomalies (area under the curve)",
        xlim=(-0.01, 1.01),
        ylim=(-0.01, 1.02),
    )
    return finished(ax)


@checked
def score_histogram(
    scores: Float[Tensor, " data"],
    anomalous: Bool[Tensor, " data"],
    *,
    n_bins: int = 40,
    score_name: str = "surprise, nats",
    ax: Axes | None = None,
) -> Figure | SubFigure:
    """Histograms of a score for normal and for anomalous data points; each sums to 1.

    Raises:
        InvalidSetting: no normal or no anomalous data points, or n_bins < 1.
    """
    values, odd = plain(scores), anomalous.cpu()
    if not 0 < int(odd.sum()) < len(odd) or n_bins < 1:
        raise InvalidSetting(
            f"Expected normal and anomalous data points and at least 1 bin, got {int(odd.sum())} anomalous of "
            f"{len(odd)} and {n_bins}."
        )
    ax = axes(ax, 7.0)
    edges = torch.linspace(
        values.min().item(), values.max().item() + 1e-9, n_bins + 1, dtype=torch.float32, device="cpu"
    ).tolist()
    for name, some, colour in (("normal", ~odd, PALETTE[0]), ("anomalous", odd, PALETTE[1])):
        shares = torch.full((int(some.sum()),), 1 / int(some.sum()), device="cpu").numpy()
        ax.hist(values[some].numpy(), edges, weights=shares, color=colour, alpha=0.2)
        ax.hist(values[some].numpy(), edges, weights=shares, color=colour, histtype="step", lw=1.6, label=name)
    ax.set(xlabel=score_name, ylabel="share of data points", title="Normal and anomalous data points")
    return finished(ax)
