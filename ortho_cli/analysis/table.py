"""A table as data, and as Markdown, CSV and HTML; text is escaped for each of them."""

from __future__ import annotations

import csv
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["Spread", "Table", "cell_text", "record_table"]

Cell = object
"""What a cell holds: text, a number, a :class:`Spread`, or None for nothing."""
DIGITS = 4  # significant ones of a number without a spread
NOTHING = "–"


@dataclass(frozen=True)
class Spread:
    """A mean over runs, its sample standard deviation (None of a single run), and how to write them.

    >>> str(Spread(0.98333, 0.0012, ".4f")), str(Spread(2.0, None, ".1f"))
    ('0.9833 ± 0.0012', '2.0')
    """

    mean: float
    sd: float | None
    number_format: str = ".4f"

    def __str__(self) -> str:
        shown = format(self.mean, self.number_format)
        return shown if self.sd is None else f"{shown} ± {format(self.sd, self.number_format)}"


@dataclass(frozen=True)
class Table:
    """Rows under headers.

    Attributes:
        name: of its file.
        title: above it.
        headers: one a column; a column of numbers goes to the right.
        rows: as wide as the headers.
        note: one sentence below it.
    """

    name: str
    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        """The table for a README, in GitHub's dialect.

        >>> print(Table("t", "", ("run", "loss"), (("a|b", 0.25),)).markdown(), end="")
        | run | loss |
        |:--|--:|
        | a\\|b | 0.25 |
        """
        rule = "|".join("--:" if self.is_numeric(column) else ":--" for column in range(len(self.headers)))
        lines = [_markdown_row(self.headers), f"|{rule}|"]
        lines += [_markdown_row([cell_text(cell) for cell in row]) for row in self.rows]
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """The table with full numbers; a spread takes two columns, `NAME mean` and `NAME sd`."""
        spreads = [any(isinstance(row[column], Spread) for row in self.rows) for column in range(len(self.headers))]
        titles = zip(self.headers, spreads, strict=True)
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([part for name, two in titles for part in ([f"{name} mean", f"{name} sd"] if two else [name])])
        for row in self.rows:
            writer.writerow([part for cell, two in zip(row, spreads, strict=True) for part in _csv_cells(cell, two)])
        return file.getvalue()

    def html(self) -> str:
        """The table as an HTML element."""
        sides = [' class="number"' if self.is_numeric(column) else "" for column in range(len(self.headers))]
        head = "".join(f"<th{side}>{html.escape(name)}</th>" for name, side in zip(self.headers, sides, strict=True))
        body = "".join(
            "<tr>"
            + "".join(f"<td{side}>{html.escape(cell_text(c))}</td>" for c, side in zip(row, sides, strict=True))
            + "</tr>\n"
            for row in self.rows
        )
        return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'

    def is_numeric(self, column: int) -> bool:
        """Whether a column holds numbers, or nothing."""
        cells = [row[column] for row in self.rows if row[column] is not None]
        return bool(cells) and all(isinstance(cell, (int, float, Spread)) and cell is not True for cell in cells)


def record_table(name: str, title: str, records: Sequence[Any], note: str = "") -> Table:
    """A row a record, a column a field of their dataclass; shapes as `3x4`.

    >>> record_table("t", "", [Spread(1.0, None)]).headers
    ('mean', 'sd', 'number_format')
    """
    headers = tuple(field.name for field in fields(records[0])) if records else ()
    rows = [[getattr(record, header) for header in headers] for record in records]
    cells = tuple(tuple("x".join(map(str, x)) if isinstance(x, tuple) else x for x in row) for row in rows)
    return Table(name, title, headers, cells, note)


def cell_text(cell: Cell) -> str:
    """A cell for people.

    >>> [cell_text(cell) for cell in (269434, 0.0462233, 1e-05, float("nan"), None, "gor", True)]
    ['269,434', '0.04622', '1e-05', 'nan', '–', 'gor', 'true']
    """
    if cell is None:
        return NOTHING
    if isinstance(cell, bool):
        return str(cell).lower()
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, float):
        whole = math.isfinite(cell) and cell == int(cell) and abs(cell) < 1e15
        return f"{int(cell):,}" if whole else f"{cell:.{DIGITS}g}"
    return str(cell)


def _markdown_row(cells: Sequence[str]) -> str:
    escaped = (html.escape(" ".join(cell.split()), quote=False).replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def _csv_cells(cell: Cell, two: bool) -> list[object]:
    if isinstance(cell, Spread):
        return [cell.mean, "" if cell.sd is None else cell.sd]
    value = "" if cell is None else cell
    return [value, ""] if two else [value]
