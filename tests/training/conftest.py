"""Runs in these tests leave out what takes most of their time and what other tests look at: the drawing of pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ortho_cli.analysis.figure import Figure


def _named(figure: Figure, path: Path, kind: str) -> None:
    path.write_text(f"{kind}: {figure.title}\n", "utf-8")


@pytest.fixture(scope="module", autouse=True)
def pictures_in_name_only() -> Iterator[None]:
    """Each picture of a report is a file with its title; `tests/analysis`, README and the demo have them drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ortho_cli.analysis.report.draw", _named)
        yield
