"""Components beside a dictionary's latents, and beside neurons."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from torch import Tensor

from apd_lens._checks import checked
from apd_lens._errors import InvalidSetting, ShapeMismatch
from apd_lens.plots._draw import NULL, PALETTE, axes, finished, image, plain, whole_numbers


@checked
def match_matrix(
    similarity: Float[Tensor, "C latents"],
    partner: Int[Tensor, " C"] | None = None,
    *,
    ax: Axes | None = None,
    label: str = "cosine",
) -> Figure | SubFigure:
    """Similarity of every component and latent, as an image with the one-to-one pairs on the diagonal.

    Pairs come first, with the most similar on top. Unpaired components and latents follow.

    Args:
        partner: the latent that each component is assigned, −1 for none, as of `compare.Matching`; default each
            component's best latent as long as it is free.
        label: name of the similarity.

    Raises:
        InvalidSetting: a latent that does not exist, or that two components have.
    """
    ax, similarity = axes(ax, 7.0, 5.5), plain(similarity)
    partner = _free_best(similarity) if partner is None else partner.cpu()
    paired = (partner >= 0).nonzero()[:, 0]
    if len(partner[paired].unique()) < len(paired) or int(partner.max()) >= similarity.shape[1]:
        raise InvalidSetting(f"Each component needs a latent of its own below {similarity.shape[1]}, or −1.")
    rows = paired[similarity[paired, partner[paired]].argsort(descending=True)]
    columns = partner[rows]
    rows, columns = (_and_the_rest(some, n) for some, n in zip((rows, columns), similarity.shape, strict=True))
    signed = bool((similarity < -1e-6).any())
    image(ax, similarity[rows][:, columns].nan_to_num(0), label, signed=signed, largest=1.0)
    ax.set(xlabel="latent (its component's place)", ylabel="component (best matched first)", title="Who matches whom")
    return ax.figure


def _free_best(similarity: Float[Tensor, "C latents"]) -> Int[Tensor, " C"]:
    """Each component's best latent, −1 where a component that is more like it has it."""
    value, latent = similarity.max(1)
    partner, taken = torch.full_like(latent, -1), set()
    for component in value.argsort(descending=True).tolist():
        if latent[component].item() not in taken:
            partner[component] = latent[component]
            taken.add(latent[component].item())
    return partner


def _and_the_rest(first: Int[Tensor, " some"], n: int) -> Int[Tensor, " n"]:
    rest = torch.ones(n, dtype=torch.bool, device="cpu")
    rest[first] = False
    return torch.cat([first, rest.nonzero()[:, 0]])


@checked
def best_matches(
    best: Mapping[str, Float[Tensor, "..."]],
    *,
    nulls: Collection[str] = (),
    ax: Axes | None = None,
    label: str = "cosine",
    of: str = "component",
) -> Figure | SubFigure:
    """Histograms of the best similarity of each component, or latent, with nulls in grey.

    Args:
        best: name -> best similarities, such as `compare.Matching.best_of_component`. NaN is left out. The legend has
            the means.
        nulls: names of the curves that are nulls.
        label: name of the similarity.
        of: what has one value each.

    Raises:
        InvalidSetting: nothing to draw, or more of a kind than there are colours.
    """
    ax, best = axes(ax, 7.0), {name: plain(values).flatten() for name, values in best.items()}
    best = {name: values[~values.isnan()] for name, values in best.items()}
    if not best or any(len(values) == 0 for values in best.values()):
        raise InvalidSetting(f"Expected values under each name, got {dict.fromkeys(best)}.")
    low = min(0.0, min(values.min().item() for values in best.values()))
    edges = torch.linspace(low, 1.0, 41, dtype=torch.float32, device="cpu").tolist()
    for name, (colour, style) in _styles(best, nulls).items():
        values = best[name]
        mean = f"{name}, mean {values.mean().item():.2f}"
        line = {"linestyle": style, "linewidth": 1.6}
        ax.hist(values.numpy(), edges, histtype="step", color=colour, label=mean, **line)
        if name not in nulls:
            ax.hist(values.numpy(), edges, color=colour, alpha=0.15)
    ax.set(xlabel=f"best {label}", ylabel=f"{of}s", title=f"Best match of each {of}", xlim=(low, 1.02))
    whole_numbers(ax.yaxis)
    return finished(ax)


@checked
def loss_against_sparsity(
    sparsity: Mapping[str, Float[Tensor, "..."]],
    loss: Mapping[str, Float[Tensor, "..."]],
    *,
    nulls: Collection[str] = (),
    target_loss: float | None = None,
    ax: Axes | None = None,
    label: str = "active units a data point",
    loss_name: str = "loss",
) -> Figure | SubFigure:
    """Curves of loss against sparsity on log axes, with nulls in grey. Lower and further left is better.

    Log axes have no place for points without active units or without loss (below 1e-7 of the largest), so these are not
    drawn.

    Args:
        sparsity, loss: name of a curve -> its points, such as `compare.Sparsity.of("active")` and `of("loss")`.
        nulls: names of the curves that are nulls.
        target_loss: of the target itself, a dotted line where it is above 0.
        label: what the sparsity counts.

    Raises:
        ShapeMismatch: a curve with other points in `loss` than in `sparsity`.
    """
    ax = axes(ax, 7.0)
    least = 1e-7 * max((values.max().item() for values in loss.values() if len(values)), default=0)
    for name, (colour, style) in _styles(sparsity, nulls).items():
        if name not in loss or loss[name].shape != sparsity[name].shape:
            came = tuple(loss[name].shape) if name in loss else "none"
            raise ShapeMismatch(f"Expected losses of {name!r} of shape {tuple(sparsity[name].shape)}, got {came}.")
        x, y = plain(sparsity[name]), plain(loss[name])
        order = x.argsort()
        order = order[(x[order] > 0) & (y[order] > least)]
        marker = "." if name in nulls else "o"
        ax.plot(x[order].numpy(), y[order].numpy(), color=colour, linestyle=style, marker=marker, ms=5, label=name)
    if target_loss is not None and target_loss > 0:
        ax.axhline(target_loss, color="0.1", linestyle=":", linewidth=1, label="target")
    ax.set(xscale="log", yscale="log", xlabel=label, ylabel=loss_name, title="Loss against sparsity")
    return finished(ax)


def _styles(names: Collection[str], nulls: Collection[str]) -> dict[str, tuple[str, Any]]:
    """A colour for each name, and grey of another line style for each null."""
    found = [name for name in names if name not in nulls]
    if len(found) > len(PALETTE) or len(names) - len(found) > len(_NULL_STYLES):
        raise InvalidSetting(
            f"Expected at most {len(PALETTE)} curves and {len(_NULL_STYLES)} nulls, got {len(found)} and "
            f"{len(names) - len(found)}."
        )
    styles = {name: (colour, "-") for name, colour in zip(found, PALETTE, strict=False)}
    grey = [name for name in names if name in nulls]
    return styles | {name: (NULL, style) for name, style in zip(grey, _NULL_STYLES, strict=False)}


_NULL_STYLES = ("--", ":", "-.", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)))
