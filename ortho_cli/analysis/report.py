"""A report: sections of text, tables, code and figures, written as one interactive HTML page and as files beside it.

report = Report("quickstart", "ResNet-20 on digits")
report.section("Training", [Curves(...), Table(...), "A paragraph."])
report.write(folder, ["html", "png", "csv"])
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ortho_cli.checkpoints.output import atomic
from ortho_cli.errors import UsageError, check_choice

from .figure import Bars, Curves, Figure, Heatmap
from .matplotlib_figure import PICTURE_FORMATS, draw
from .table import Table

__all__ = ["FORMATS", "Code", "Fact", "Part", "Picture", "Report", "parse_formats"]

FORMATS = ("html", *PICTURE_FORMATS, "csv", "json")
FIGURES = "figures"  # the folder of the pictures


@dataclass(frozen=True)
class Code:
    """Text to copy: a command or a recipe; `summary` folds it away under a line."""

    text: str
    summary: str | None = None


@dataclass(frozen=True)
class Fact:
    """A number that the page opens with, and what it is."""

    value: str
    label: str


@dataclass(frozen=True)
class Picture:
    """A picture in a file, made by whatever the report is about."""

    path: Path
    title: str


Part = str | Table | Code | Figure | Picture
"""A paragraph, a table, text to copy, a figure, or a picture."""


@dataclass
class Report:
    """What a page says, in order.

    Attributes:
        title: of the page.
        subtitle: one line below it.
        facts: large numbers at the top.
        sections: titles with their parts; figures and pictures that follow each other share rows on a wide screen.
        name: of the page's file.
        further: tables that are written as CSV, but not shown.
        data: what programs read, as JSON.
        texts: further files, by name, e.g. `README.md`.
    """

    title: str
    subtitle: str = ""
    facts: tuple[Fact, ...] = ()
    sections: list[tuple[str, tuple[Part, ...]]] = field(default_factory=list)
    name: str = "report"
    further: tuple[Table, ...] = ()
    data: Mapping[str, Any] | None = None
    texts: dict[str, str] = field(default_factory=dict)

    def section(self, title: str, parts: Iterable[Part]) -> None:
        """Add a section; one without parts is left out."""
        listed = tuple(parts)
        if listed:
            self.sections.append((title, listed))

    def parts(self) -> Iterator[Part]:
        """All parts, in order."""
        for _, parts in self.sections:
            yield from parts

    def html(self) -> str:
        """The page: one file that needs nothing else and no network."""
        from .page import page

        return page(self)

    def files(self, formats: Sequence[str]) -> dict[str, Callable[[Path], object]]:
        """What the report writes: names below its folder, each with what writes it to a path.

        Args:
            formats: of `FORMATS`: `html` is the page, `csv` the tables, `json` the data, the others are the figures,
                in `figures/`. Markdown is always written.
        """
        found: dict[str, Callable[[Path], object]] = {}
        if "html" in formats:
            found[f"{self.name}.html"] = _writer(self.html)
        figures = [part for part in self.parts() if isinstance(part, (Curves, Heatmap, Bars))]
        for kind in (kind for kind in PICTURE_FORMATS if kind in formats):
            found |= {f"{FIGURES}/{figure.name}.{kind}": partial(draw, figure, kind=kind) for figure in figures}
        if "csv" in formats:
            tables = [part for part in self.parts() if isinstance(part, Table)]
            found |= {f"{table.name}.csv": _writer(table.csv) for table in (*tables, *self.further)}
        if "json" in formats and self.data is not None:
            found[f"{self.name}.json"] = _writer(partial(_json, self.data))
        return found | {name: _writer(partial(str, text)) for name, text in self.texts.items()}

    def write(self, folder: Path, formats: Sequence[str]) -> list[Path]:
        """Write all `files` into a folder, each whole or not at all, in place of earlier ones; others there stay.

        Raises:
            OutputError: they cannot be written.
        """
        written = []
        for name, produce in self.files(formats).items():
            with atomic(folder / name) as path:
                produce(path)
            written.append(folder / name)
        return written


def parse_formats(text: str) -> list[str]:
    """The formats of `--format html,png`.

    Raises:
        UsageError: one that does not exist, or none.

    >>> parse_formats("html, png")
    ['html', 'png']
    """
    found = [word.strip() for word in text.split(",") if word.strip()]
    if not found:
        raise UsageError("--format names no format", hint=f"one or more of {','.join(FORMATS)}")
    for word in found:
        check_choice("--format", word, FORMATS)
    return list(dict.fromkeys(found))


def _writer(text: Callable[[], str]) -> Callable[[Path], object]:
    """What writes a text that is only made then."""
    return lambda path: path.write_text(text(), "utf-8")


def _json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2, allow_nan=False) + "\n"
