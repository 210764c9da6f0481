"""Plain-text tables."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from apd_lens._errors import MissingExtra

if TYPE_CHECKING:
    from pandas import DataFrame


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
