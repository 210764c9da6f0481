"""What the model gives out on all, some and none of its components."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from apd_lens._checks import checked
from apd_lens._errors import InvalidSetting
from apd_lens.metrics import AblationPath
from apd_lens.plots._draw import (
    ANTI_SCRUBBED,
    LABEL,
    PALETTE,
    SCRUBBED,
    SPARSE,
    TARGET,
    axes,
    grid,
    legend,
    panels,
    plain,
    plain_curves,
    whole_numbers,
)


@checked
def single_feature_responses(
    target: Float[Tensor, "n_features n_outputs"],
    sparse: Float[Tensor, "n_features n_outputs"],
    label: Float[Tensor, "n_features n_outputs"] | None = None,
    *,
    features: Sequence[int] | None = None,
) -> Figure:
    """All outputs on inputs in which one feature is active, a panel for each of some features.

    Args:
        target, sparse: row i is the output where feature i alone is active, of the target and of the sparse model.
        label: what the target was trained to give.
        features: which to draw; default six of them, evenly spread.

    Raises:
        InvalidSetting: no feature, or one that does not exist.

    Source: the paper's residual MLP.
    """
    n_features, n_outputs = target.shape
    features = _evenly(n_features, 6) if features is None else features
    if not features or not 0 <= min(features) <= max(features) < n_features:
        raise InvalidSetting(f"features must be numbers from 0 to {n_features - 1}, got {features}.")
    target, sparse = plain(target), plain(sparse)
    figure, drawn = panels(len(features), min(len(features), 2), 5.0, 1.7)
    outputs = range(n_outputs)
    size = 34 if n_outputs <= 40 else 12
    for ax, feature in zip(drawn, features, strict=True):
        grid(ax)
        if label is not None:
            ax.bar(outputs, plain(label)[feature].numpy(), width=0.8, color=LABEL, label="label", zorder=1)
        ax.scatter(
            outputs, target[feature].numpy(), s=size, facecolors="none", edgecolors=TARGET, label="target", zorder=2
        )
        ax.scatter(outputs, sparse[feature].numpy(), s=size / 4, color=SPARSE, label="sparse", zorder=3)
        ax.set_title(f"feature {feature} active", fontsize=10)
        ax.margins(x=0.02)
        whole_numbers(ax.xaxis)
    figure.supxlabel("output", fontsize=10)
    figure.supylabel("value", fontsize=10)
    handles, names = drawn[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", frameon=False)
    figure.suptitle("Outputs where one feature alone is active")
    return figure


def _evenly(n: int, most: int) -> list[int]:
    return torch.linspace(0, n - 1, min(n, most), dtype=torch.float32, device="cpu").round().int().tolist()


@checked
def feature_loss(
    target: Float[Tensor, " n_features"],
    sparse: Mapping[str, Float[Tensor, " n_features"]],
    *,
    by_loss: bool = True,
    ax: Axes | None = None,
) -> Figure | SubFigure:
    """Loss of each feature on a log axis, of the target and of sparse models; the mean stands in the legend.

    Args:
        target: mean loss over data points in which the feature is active, or in which it alone is.
        sparse: name of a way to select -> the same; such as "top-1" and "batch top-k".
        by_loss: whether to sort features by the target's loss, largest first.

    Raises:
        ShapeMismatch: a curve of another shape than the target's.

    Source: the paper's residual MLP.
    """
    ax, curves = axes(ax, 7.5), plain_curves({"target": target, **_named_sparse(sparse)}, target)
    order = plain(target).argsort(descending=True) if by_loss else torch.arange(len(target), device="cpu")
    size = 24 if len(order) <= 40 else 12
    for (name, losses), colour, marker in zip(curves.items(), [TARGET, *PALETTE], "osD^vP*", strict=False):
        mean = f"{name}, mean {losses.mean().item():.2g}"
        ax.scatter(
            range(len(order)), losses[order].numpy(), s=size, color=colour, marker=marker, label=mean, alpha=0.85
        )
    ax.set(
        yscale="log",
        xlabel="feature (sorted by the target's loss)" if by_loss else "feature",
        ylabel="loss",
        title="Loss of each feature",
    )
    whole_numbers(ax.xaxis)
    ax.margins(x=0.02)
    grid(ax)
    legend(ax)
    return ax.figure


def _named_sparse(sparse: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if len(sparse) > len(PALETTE):
        raise InvalidSetting(f"Expected at most {len(PALETTE)} curves, got {len(sparse)}: {list(sparse)}.")
    return {f"sparse, {name}": curve for name, curve in sparse.items()}


@checked
def loss_by_active(
    n_active: Int[Tensor, " data"],
    target: Float[Tensor, " data"],
    sparse: Mapping[str, Float[Tensor, " data"]],
    *,
    counted: str = "features",
    ax: Axes | None = None,
) -> Figure | SubFigure:
    """Mean loss of the data points on which so many features, or components, are active; on a log axis.

    Bars are two standard errors each way, down to a tenth of the mean at most, where more than one data point has that
    number. How many have it stands above the axes.

    Args:
        n_active: number of active features, or components, of each data point.
        target: loss of each data point.
        sparse: name of a way to select -> the same; such as "top-1" and "batch top-k".
        counted: what `n_active` counts.

    Raises:
        ShapeMismatch: a curve of another shape than the target's.
    """
    ax, curves = axes(ax, 7.5), plain_curves({"target": target, **_named_sparse(sparse)}, target)
    numbers, group, counts = n_active.cpu().unique(return_inverse=True, return_counts=True)
    for (name, losses), colour, marker in zip(curves.items(), [TARGET, *PALETTE], "osD^vP*", strict=False):
        mean = torch.zeros(len(numbers), dtype=losses.dtype, device="cpu").index_add_(0, group, losses) / counts
        squares = torch.zeros_like(mean).index_add_(0, group, (losses - mean[group]).square())
        error = 2 * (squares / (counts - 1).clamp_min(1) / counts).sqrt()
        below = torch.minimum(error, 0.9 * mean)
        mean[mean == 0] = torch.nan
        ax.errorbar(
            numbers.numpy(),
            mean.numpy(),
            [below.tolist(), error.tolist()],
            color=colour,
            marker=marker,
            ms=5,
            capsize=2,
            lw=1.2,
            label=name,
        )
    ax.set(yscale="log", xlabel=f"active {counted} of a data point", ylabel="mean loss")
    ax.set_title(f"Loss by number of active {counted}")
    whole_numbers(ax.xaxis)
    top = ax.secondary_xaxis("top")
    top.set_xticks(numbers.tolist(), [f"{count:,}" for count in counts.tolist()], fontsize=7, color="0.4")
    top.set_xlabel("data points", fontsize=7, color="0.4")
    top.tick_params(length=0, pad=1)
    top.spines[:].set_visible(False)
    grid(ax)
    legend(ax)
    return ax.figure


@checked
def scrubbed_losses(
    target: Float[Tensor, "*target"],
    scrubbed: Float[Tensor, "*scrubbed"],
    anti_scrubbed: Float[Tensor, "*anti_scrubbed"],
    *,
    n_bins: int = 60,
    ax: Axes | None = None,
) -> Figure | SubFigure:
    """Histograms of the loss of each data point on a log axis: of the target, and scrubbed and anti-scrubbed.

    Dashed lines are medians, which stand in the legend. Losses below the 0.5 % quantile of those above zero are counted
    in the first bin.

    Args:
        target, scrubbed, anti_scrubbed: losses in any shape, such as of several random scrubbings; see
            `apd_lens.metrics.scrubbed_mask`.

    Raises:
        InvalidSetting: no loss is above zero, or n_bins < 1.

    Source: the paper's residual MLPs, after causal scrubbing.
    """
    losses = {
        ("target", TARGET): plain(target).flatten(),
        ("scrubbed", SCRUBBED): plain(scrubbed).flatten(),
        ("anti-scrubbed", ANTI_SCRUBBED): plain(anti_scrubbed).flatten(),
    }
    together = torch.cat(list(losses.values()))
    positive = together[together > 0]
    if len(positive) == 0 or n_bins < 1:
        raise InvalidSetting(f"Expected losses above zero and at least 1 bin, got {len(positive)} and {n_bins}.")
    smallest = positive.kthvalue(1 + len(positive) // 200).values
    low, high = smallest.log10().item() - 0.01, positive.max().log10().item() + 0.01
    edges = torch.logspace(low, high, n_bins + 1, dtype=together.dtype)
    ax = axes(ax, 7.5)
    for (name, colour), values in losses.items():
        label = f"{name}, median {values.median().item():.2g}"
        binned, shares = values.clamp_min(edges[0]).numpy(), np.full(len(values), 1 / len(values))
        ax.hist(binned, edges.tolist(), weights=shares, color=colour, alpha=0.15)
        ax.hist(
            binned,
            edges.tolist(),
            weights=shares,
            color=colour,
            histtype="step",
            lw=1.6,
            label=label,
        )
        ax.axvline(max(values.median().item(), edges[0].item()), color=colour, linestyle="--", linewidth=1)
    ax.set(xscale="log", xlabel="loss of a data point", ylabel="share of data points")
    ax.set_title("Loss of data points, scrubbed and anti-scrubbed")
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    grid(ax)
    legend(ax)
    return ax.figure


@checked
def scrubbed_outputs(
    x: Float[Tensor, " points"],
    target: Float[Tensor, " points"],
    scrubbed: Float[Tensor, "draws points"],
    anti_scrubbed: Float[Tensor, "other_draws points"],
    *,
    input_name: str = "input",
    ax: Axes | None = None,
) -> Figure | SubFigure:
    """One output against the one input that is varied: of the target, and of every random scrubbing.

    Args:
        x: values of the input.
        scrubbed, anti_scrubbed: the output under a mask for each draw, see `apd_lens.metrics.scrubbed_mask`.

    Source: the paper's residual MLPs, after causal scrubbing.
    """
    ax, at = axes(ax, 7.0), plain(x).numpy()
    for name, curves, colour in (
        ("anti-scrubbed", anti_scrubbed, ANTI_SCRUBBED),
        ("scrubbed", scrubbed, SCRUBBED),
    ):
        lines = ax.plot(at, plain(curves).T.numpy(), color=colour, linewidth=0.9, alpha=0.6)
        lines[0].set_label(f"{name}, {len(lines)} draws")
    ax.plot(at, plain(target).numpy(), color=TARGET, linewidth=1.8, linestyle="--", label="target")
    ax.set(xlabel=f"value of {input_name}", ylabel="output", title=f"Output as {input_name} varies")
    ax.locator_params(axis="x", nbins=6)
    grid(ax)
    legend(ax)
    return ax.figure


@checked
def ablation_path(path: AblationPath, *, ax: Axes | None = None) -> Figure | SubFigure:
    """Output error as inactive components are ablated: together, each at random, and where it does most harm.

    Args:
        path: from `apd_lens.metrics.ablation_path_audit`.
    """
    ax, amount = axes(ax, 7.0), plain(path.amount).numpy()
    looks: tuple[tuple[str, Tensor, dict[str, Any]], ...] = (
        ("worst case", path.worst, {"color": ANTI_SCRUBBED, "marker": "^", "markersize": 10}),
        ("each at random", path.random, {"color": SCRUBBED, "marker": "o"}),
        ("all together", path.together, {"color": SPARSE, "marker": "s", "markersize": 4, "linestyle": "--"}),
    )
    for name, errors, look in looks:
        ax.plot(amount, plain(errors).numpy(), label=name, **look)
    ax.set(
        yscale="log",
        xlabel="t, how far inactive components may be ablated",
        ylabel="output error",
        title="Do inactive components matter?",
    )
    grid(ax)
    legend(ax)
    return ax.figure
