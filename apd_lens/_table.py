"""Plain-text tables."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from apd_lens._errors import MissingExtra

if TYPE_CHECKING:
    from pandas import DataFrame


# What a printed table or line should fit into.
WIDTH = 120


def short_names(names: Sequence[str]) -> list[str]:
    """Names of matrices without what all of them share, as short as they stay distinct.

    >>> short_names(["model.layers.3.self_attn.q_proj.weight", "model.layers.23.mlp.up_proj.weight", "lm_head.weight"])
    ['L3 q', 'L23 up', 'lm_head']
    >>> short_names(["blocks.0.attn.W_Q", "blocks.0.mlp.W_in", "embed.W_E"])
    ['L0 Q', 'L0 in', 'E']
    """
    cut = [_layer_and_rest(name) for name in names]
    for shorten in (_kernel, lambda rest: rest.rpartition(".")[2], lambda rest: rest):
        short = [f"{layer} {shorten(rest)}".strip() for layer, rest in cut]
        if len(set(short)) == len(names):
            return short
    return list(names)


def _layer_and_rest(name: str) -> tuple[str, str]:
    parts = name.removesuffix(".weight").split(".")
    place = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if place is None or place == len(parts) - 1:
        return "", ".".join(parts)
    return f"L{parts[place]}", ".".join(parts[place + 1 :])


def _kernel(rest: str) -> str:
    """What is left of "self_attn.q_proj" and "attn.W_Q" without what such names are made with."""
    last = rest.rpartition(".")[2]
    return last.removesuffix("_proj").removeprefix("W_") or last


def listed(items: Sequence[str], at_most: int) -> str:
    """The first of them, and how many others there are."""
    others = len(items) - at_most
    return ", ".join(items[:at_most]) + (f" and {others} others" if others > 0 else "")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell, numbers to the right, under a ruled header."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [all(_is_number(cell) for cell in column[1:]) for column in columns]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), "  ".join("─" * width for width in widths), *map(line, rows)])


def _is_number(cell: str) -> bool:
    try:
        float(cell.rstrip("% "))
    except ValueError:
        return cell in ("", "-")
    return True


def frame(columns: Mapping[str, Tensor | Sequence[Any]]) -> "DataFrame":
    """A pandas table of columns of one length.

    Raises:
        MissingExtra: pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError:
        raise MissingExtra("Tables need pandas. Install it with pip install 'apd-lens[compare]'") from None
    return pd.DataFrame(
        {name: column.tolist() if isinstance(column, Tensor) else column for name, column in columns.items()}
    )


def as_text(table: "DataFrame") -> str:
    """All columns, numbers with four digits."""
    return table.to_string(float_format=lambda number: f"{number:.4g}")
