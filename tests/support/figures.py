"""Reading back what a figure shows."""

import math

import torch
from torch import Tensor


def shown(ax) -> Tensor:
    return torch.from_numpy(ax.images[0].get_array().filled(math.nan)).float()


def lines(ax) -> dict[str, tuple[list[float], list[float]]]:
    """Label -> x and y, of the lines that have one."""
    named = (line for line in ax.get_lines() if not line.get_label().startswith("_"))
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in named}


def dots(ax) -> dict[str, list[list[float]]]:
    """Label -> places of the dots."""
    return {kind.get_label(): kind.get_offsets().tolist() for kind in ax.collections}


def legend_of(ax) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]
