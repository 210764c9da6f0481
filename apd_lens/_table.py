"""Tables: as text, as HTML for notebooks, and of pandas."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from torch import Tensor

from apd_lens._errors import MissingExtra

if TYPE_CHECKING:
    from pandas import DataFrame


# What a printed table or line should fit into.
WIDTH = 120
# Rows that a long table prints.
_SHOWN = 20


def short_names(names: Sequence[str]) -> list[str]:
    """Names of matrices without what all of them share, as short as they stay distinct; tables, figures and reports
    have them. A name of one part stays.

    >>> short_names(["model.layers.3.self_attn.q_proj.weight", "model.layers.23.mlp.up_proj.weight", "lm_head.weight"])
    ['L3 q', 'L23 up', 'lm_head']
    >>> short_names(["blocks.0.attn.W_Q", "blocks.0.mlp.W_in", "embed.W_E"])
    ['L0 Q', 'L0 in', 'E']
    >>> short_names(["W_in", "blocks.0.mlp.W_in"])
    ['W_in', 'L0 in']
    >>> short_names(["a0.7", "a1.3", "a0.7"])
    ['a0.7', 'a1.3', 'a0.7']
    """
    cut = [_layer_and_rest(name) for name in names]
    for shorten in (_kernel, _last, lambda rest: rest):
        short = [
            f"{layer} {shorten(rest)}".strip() if "." in name else name
            for name, (layer, rest) in zip(names, cut, strict=True)
        ]
        if len(set(short)) == len(set(names)):
            return short
    return list(names)


def example_of(short: Sequence[str], names: Sequence[str]) -> list[str]:
    """A line that says what a short name stands for, of a layer if there are layers; none where all but "weight" is
    there."""
    pairs = sorted(zip(short, names, strict=True), key=lambda pair: " " not in pair[0])
    return [f"{one} is {name}" for one, name in pairs if one != name.removesuffix(".weight")][:1]


def _layer_and_rest(name: str) -> tuple[str, str]:
    parts = name.removesuffix(".weight").split(".")
    place = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if place is None or place == len(parts) - 1:
        return "", ".".join(parts)
    return f"L{parts[place]}", ".".join(parts[place + 1 :])


def _kernel(rest: str) -> str:
    """What is left of "self_attn.q_proj" and "attn.W_Q" without what such names are made with."""
    last = _last(rest)
    return last.removesuffix("_proj").removeprefix("W_") or last


def _last(rest: str) -> str:
    last = rest.rpartition(".")[2]
    return rest if last.isdecimal() else last


def listed(items: Sequence[str], at_most: int) -> str:
    """The first of them, and how many others there are."""
    others = len(items) - at_most
    return ", ".join(items[:at_most]) + (f" and {others} others" if others > 0 else "")


class Table(str):
    """A table as text, which has itself as HTML too."""

    html: str


def table(header: Sequence[str], rows: Sequence[Sequence[str]], whole: Mapping[str, str] | None = None) -> Table:
    """Columns padded to their widest cell, numbers to the right, under a ruled header.

    Args:
        whole: text of a cell -> what it is short for, which HTML shows under the pointer.
    """
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [all(_is_number(cell) for cell in column[1:]) for column in columns]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        )
        return "  ".join(padded).rstrip()

    def row(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(map(cell, cells, numeric, [tag] * len(cells)))}</tr>"

    def cell(text: str, right: bool, tag: str) -> str:
        title = f' title="{escape(whole[text])}"' if whole and text in whole else ""
        side = "right" if right else "left"
        return f'<{tag} style="text-align: {side}; white-space: pre"{title}>{escape(text)}</{tag}>'

    found = Table("\n".join([line(header), "  ".join("─" * width for width in widths), *map(line, rows)]))
    body = "".join(row(cells, "td") for cells in rows)
    found.html = f"<table><thead>{row(header, 'th')}</thead><tbody>{body}</tbody></table>"
    return found


class Printed:
    """A result that prints as lines and tables. A notebook shows the same as HTML, in a box that scrolls.

    A dataclass of this kind has `repr=False`, or it gets a repr of its own.
    """

    def _parts(self) -> Sequence[str]:
        """Lines, and tables, from top to bottom."""
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n".join(self._parts())

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        shown = [part.html if isinstance(part, Table) else f"<pre>{escape(part)}</pre>" for part in self._parts()]
        return f'<div style="max-width: 100%; max-height: 36em; overflow: auto">{"".join(shown)}</div>'


class Tabled(Printed):
    """A result that is a table. It prints the first rows."""

    def table(self) -> "DataFrame":
        raise NotImplementedError

    def _parts(self) -> list[str]:
        try:
            rows = self.table()
        except MissingExtra as error:  # printing does not fail
            return [f"{type(self).__name__}. {error}"]
        return [as_table(rows.head(_SHOWN)), f"{min(len(rows), _SHOWN)} of {len(rows)} rows; .table() has all"]


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


def as_table(rows: "DataFrame") -> Table:
    """A pandas table, numbers with four digits; with its index if that has a name."""
    shown = rows.reset_index() if rows.index.name else rows
    cells = [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in row] for row in shown.itertuples(False, None)]
    return table([str(name) for name in shown.columns], cells)
