"""Reports: one page that needs nothing else, text that stays text, folders that appear whole."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ortho_cli.analysis.figure import Curves, Line
from ortho_cli.analysis.report import FORMATS, Code, Fact, Report, parse_formats
from ortho_cli.analysis.report_folder import check_folder, write_folder
from ortho_cli.analysis.table import Spread, Table
from ortho_cli.errors import OutputError, UsageError

HOSTILE = "</script><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>|`$"


def report() -> Report:
    made = Report(HOSTILE, HOSTILE, (Fact(HOSTILE, HOSTILE),))
    table = Table("numbers", HOSTILE, ("run", HOSTILE), ((HOSTILE, Spread(0.5, 0.1, ".2f")), ("b", None)), HOSTILE)
    figure = Curves("figure", HOSTILE, (Line(HOSTILE, (0, 1), (1.0, 2.0)), Line("b", (0, 1), (2.0, 1.0))), note=HOSTILE)
    made.section(HOSTILE, [HOSTILE, table, figure, Code(HOSTILE), Code(HOSTILE, summary=HOSTILE)])
    made.section("left out", [])
    made.data, made.texts["notes.md"] = {"a": 1}, "text\n"
    return made


class Page(HTMLParser):
    """Elements, attributes and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.get_starttag_text() and self.tags[-1] == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)


def test_the_page_needs_nothing_and_asks_for_nothing() -> None:
    text = report().html()
    page = Page(text)
    assert not [value for name, value in page.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert "link" not in page.tags and "img" not in page.tags and "@import" not in text.split("</style>")[0]
    policy = next(value for name, value in page.attributes if value.startswith("default-src"))
    assert policy.startswith("default-src 'none'") and "http" not in policy
    assert text.count("Plotly.react") == 1 and text.count("plotly.js v") == 1  # the library is there once


def test_text_stays_text() -> None:
    page = Page(report().html())
    assert page.tags.count("script") == 4  # the figure, the style, the library, and what draws
    assert "left out" not in report().html()
    figures = [text for attributes, text in page.scripts if attributes.get("type") == "application/json"]
    assert json.loads(figures[0])["data"][0]["name"].startswith("&lt;/script&gt;")
    assert set(json.loads(figures[1])) == {"themes", "font"}


def test_a_page_without_figures_is_small() -> None:
    made = Report("title")
    made.section("section", ["text"])
    assert len(made.html()) < 10_000


def test_files_of_every_format(tmp_path: Path) -> None:
    names = {
        "html": ["report.html"], "png": ["figures/figure.png"], "svg": ["figures/figure.svg"],
        "pdf": ["figures/figure.pdf"], "csv": ["numbers.csv"], "json": ["report.json"],
    }  # fmt: skip
    assert set(names) == set(FORMATS)
    for kind, expected in names.items():
        written = report().write(tmp_path / kind, [kind])
        assert [path.relative_to(tmp_path / kind).as_posix() for path in written] == [*expected, "notes.md"]
        assert all(path.stat().st_size for path in written)
    rows = list(csv.reader((tmp_path / "csv" / "numbers.csv").read_text("utf-8").splitlines()))
    assert rows == [["run", f"{HOSTILE} mean", f"{HOSTILE} sd"], [HOSTILE, "0.5", "0.1"], ["b", "", ""]]


def test_markdown_tables_hold_any_text() -> None:
    table = Table("t", "", ("a|b", "n"), (("line\nbreak <x>", 1), ("-", None)))
    assert table.markdown() == "| a\\|b | n |\n|:--|--:|\n| line break &lt;x&gt; | 1 |\n| - | – |\n"


@pytest.mark.parametrize(("text", "reason"), [("html,jpg", "'jpg' is none of"), (" , ", "names no format")])
def test_a_format_that_does_not_exist(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parse_formats(text)


def test_a_folder_appears_whole_and_only_reports_are_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    check_folder(folder, [], "notes.md", force=False)
    written = write_folder(report(), folder, ["csv", "png"])
    assert sorted(Path(item["path"]).name for item in written) == ["figure.png", "notes.md", "numbers.csv"]
    with pytest.raises(OutputError, match="exists"):
        check_folder(folder, [], "notes.md", force=False)
    (folder / "old.csv").write_text("from an earlier report")
    check_folder(folder, [], "notes.md", force=True)
    write_folder(report(), folder, ["csv"], force=True)
    assert sorted(path.name for path in folder.iterdir()) == ["notes.md", "numbers.csv"]
    for stranger in ("thesis.docx", "figures.png/x.png"):
        path = folder / stranger
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        with pytest.raises(OutputError, match="no part of a report"):
            check_folder(folder, [], "notes.md", force=True)
        path.unlink()
    with pytest.raises(OutputError, match=re.escape("holds no table.md")):
        check_folder(folder, [], "table.md", force=True)
