"""A report as one HTML file: plotly once, the figures as JSON, the house's own style; no request leaves the page."""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
from importlib import resources
from typing import TYPE_CHECKING, Any

from ortho_cli import __version__
from ortho_cli.errors import CheckpointError

from .figure import Bars, Curves, Figure, Heatmap
from .plotly_figure import to_plotly
from .report import Code, Picture
from .style import FONT, INK, SCALES
from .table import Table

if TYPE_CHECKING:
    from .report import Part, Report

__all__ = ["page"]

# The browser refuses what would leave the page, whatever a library or a name in a run may try.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
MOST_PIXELS = 1024  # of a picture's longer side in the page; the file keeps what it has
LARGE = 16  # rows or columns of a heatmap that has the whole width


def page(report: Report) -> str:
    """The whole page. All text of the caller's is escaped."""
    body = [f"<h1>{html.escape(report.title)}</h1>"]
    if report.subtitle:
        body.append(f'<p class="subtitle">{html.escape(report.subtitle)}</p>')
    if report.facts:
        facts = (f"<li><b>{html.escape(fact.value)}</b><span>{html.escape(fact.label)}</span></li>"
                 for fact in report.facts)  # fmt: skip
        body.append(f'<ul class="facts">{"".join(facts)}</ul>')
    for title, parts in report.sections:
        body.append(f"<h2>{html.escape(title)}</h2>")
        for flows, group in itertools.groupby(parts, lambda part: not isinstance(part, (str, Table, Code))):
            cards = [_card(part) for part in group]
            body += [f'<div class="figures">{"".join(cards)}</div>'] if flows else cards
    body.append(f"<footer>Made by ortho {__version__}.</footer>")
    drawn = any(isinstance(part, (Curves, Heatmap, Bars)) for part in report.parts())
    return "\n".join((
        "<!doctype html>",
        '<html lang="en">',
        '<head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(report.title)}</title>",
        f"<style>{_colors()}{_resource('page.css')}</style></head>",
        f"<body><main>{''.join(body)}</main>",
        _scripts() if drawn else "",
        "</body></html>\n",
    ))  # fmt: skip


def _card(part: Part) -> str:
    if isinstance(part, str):
        return f"<p>{html.escape(part)}</p>"
    if isinstance(part, Table):
        return _framed(part.title, part.html(), part.note)
    if isinstance(part, (Curves, Heatmap, Bars)):
        large = isinstance(part, Heatmap) and not part.ends and max(len(part.rows), len(part.columns)) > LARGE
        return _framed(part.title, _plot(part), part.note, "card full" if large else "card")
    if isinstance(part, Picture):
        return _framed(part.title, _image(part), "")
    code = f"<pre>{html.escape(part.text)}</pre>"
    if part.summary is not None:
        code = f"<details><summary>{html.escape(part.summary)}</summary>{code}</details>"
    return _framed("", code, "")


def _framed(title: str, content: str, note: str, classes: str = "card") -> str:
    head = f"<h3>{html.escape(title)}</h3>" if title else ""
    foot = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return f'<section class="{classes}">{head}{content}{foot}</section>'


def _plot(figure: Figure) -> str:
    made = to_plotly(figure)
    style = f"min-height:{made['meta']['height']}px"  # so that nothing moves when the figure comes
    label = html.escape(figure.title)
    return f'{_data(made)}<div class="plot" style="{style}" role="img" aria-label="{label}"></div>'


def _image(picture: Picture) -> str:
    """The picture itself, small enough for a page of several.

    Raises:
        CheckpointError: the file holds none.
    """
    from PIL import Image

    file = io.BytesIO()
    try:
        with Image.open(picture.path) as opened:
            opened.thumbnail((MOST_PIXELS, MOST_PIXELS))
            opened.save(file, format="PNG", optimize=True)
    except OSError as error:
        raise CheckpointError(f"no picture: {str(error)[:120]}", where=str(picture.path)) from error
    content = base64.b64encode(file.getvalue()).decode("ascii")
    return f'<img alt="{html.escape(picture.title)}" src="data:image/png;base64,{content}">'


def _scripts() -> str:
    from plotly.offline import get_plotlyjs

    themes = {
        name: {"ink": INK[name], **{scale: colors[name] for scale, colors in SCALES.items()}}
        for name in ("light", "dark")
    }
    style = _data({"themes": themes, "font": FONT}, 'id="style" ')
    return f"{style}\n<script>{get_plotlyjs()}</script>\n<script>{_resource('page.js')}</script>"


def _colors() -> str:
    """The house's colours as variables of the style sheet, by the reader's system."""
    light, dark = ("".join(f"--{key}:{value};" for key, value in INK[name].items()) for name in ("light", "dark"))
    return f":root{{color-scheme:light dark;{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}\n"


def _data(content: dict[str, Any], attributes: str = "") -> str:
    """JSON inside a page: no `<` may end the element that holds it."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script {attributes}type="application/json">{text}</script>'


def _resource(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")
