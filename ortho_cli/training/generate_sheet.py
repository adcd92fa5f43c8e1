"""The contact sheet of a folder of pictures: one page with each of them, what it was drawn of, and from which seed.

A page and not a picture, so that whoever judges the folder does not take the sheet for one of them.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ortho_cli.analysis.style import FONT, INK
from ortho_cli.checkpoints.output import atomic

__all__ = ["SHEET", "write_sheet"]

SHEET = "contact-sheet.html"
STYLE = (
    "body{{margin:2rem;background:{page};color:{text};font:14px {font}}}"
    "main{{display:grid;grid-template-columns:repeat(auto-fill,minmax(14rem,1fr));gap:1rem}}"
    "figure{{margin:0;padding:.5rem;background:{paper};border:1px solid {grid};border-radius:6px}}"
    "img{{width:100%;image-rendering:auto}}figcaption,p{{color:{faint};overflow-wrap:anywhere}}"
)


def write_sheet(folder: Path, settings: Mapping[str, Any], lines: Iterable[Mapping[str, Any]]) -> None:
    """Write `contact-sheet.html` beside the pictures.

    Args:
        folder: of the pictures.
        settings: what they have in common, said at the top.
        lines: of the manifest, one a picture: `file`, `prompt`, `seed`.
    """
    common = ", ".join(f"{key} {_said(value)}" for key, value in settings.items() if value not in (None, [], ""))
    light, dark = (STYLE.format(font=FONT, **INK[name]) for name in ("light", "dark"))
    page = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src 'self' file:; "
        "style-src 'unsafe-inline'\">",
        f"<title>{html.escape(folder.name)}</title>",
        f"<style>{light}@media(prefers-color-scheme:dark){{{dark}}}</style></head>",
        f"<body><h1>{html.escape(folder.name)}</h1><p>{html.escape(common)}</p><main>",
        *map(_figure, lines),
        "</main></body></html>\n",
    ]
    with atomic(folder / SHEET) as partial:
        partial.write_text("\n".join(page), "utf-8")


def _figure(line: Mapping[str, Any]) -> str:
    name, prompt = quote(str(line["file"])), html.escape(str(line.get("prompt", "")), quote=True)
    seed = html.escape(f"{line['file']}, seed {line['seed']}")
    return (
        f'<figure><a href="{name}"><img src="{name}" alt="{prompt}" loading="lazy"></a>'
        f"<figcaption>{prompt}<br>{seed}</figcaption></figure>"
    )


def _said(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
