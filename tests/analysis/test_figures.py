"""Figures: decided once, drawn twice; nothing of the caller's is read as markup, and nothing covers anything."""

from __future__ import annotations

import io
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ortho_cli.analysis.figure import Bars, Curves, Figure, Heatmap, Line, limits, shorten, spread_labels
from ortho_cli.analysis.matplotlib_figure import PICTURE_FORMATS, draw
from ortho_cli.analysis.plotly_figure import to_plotly
from ortho_cli.analysis.style import LABEL_GAP

HOSTILE = "<b>$x_1$ & 統計</b>"
NAN = math.nan
FIGURES: dict[str, Figure] = {
    "curves": Curves(
        "curves", HOSTILE,
        (
            Line(HOSTILE, (0, 1, 2), (3.0, NAN, 1.0), (2.5, NAN, 0.5), (3.5, NAN, 1.5), mark=(2, 1.0, HOSTILE)),
            Line("second", (0, 1, 2), (3.0, 2.0, 1.0)),
        ),
    ),
    "decades": Curves("decades", "", (Line("a", (0, 1), (1.0, 1e-4), (-1.0, 1e-9), (2.0, 2e-4)),)),
    "one point": Curves("one", "", (Line("a", (3,), (1.0,)),)),
    "nothing": Curves("nothing", "", (Line("a", (), ()),)),
    "heatmap": Heatmap("heatmap", "", (HOSTILE, "b"), ("1", "2"), ((0.0, None), (1.0, 0.5)), cell_format=".2f"),
    "signed": Heatmap("signed", "", ("a",), ("1", "2"), ((-1.0, 3.0),), diverging=True),
    "constant": Heatmap("constant", "", ("a",), ("1",), ((2.0,),)),
    "bars": Bars("bars", "", (HOSTILE, "b"), (1.0, 3.0)),
    "dots": Bars("dots", "", ("a", "b"), (1.0, 3.0), (0.5, 0.0), ((0.5, 1.5), (3.0,)), from_zero=False),
}  # fmt: skip


@pytest.mark.parametrize("name", FIGURES)
def test_plotly_knows_every_attribute(name: str) -> None:
    import plotly.graph_objects as go

    made = to_plotly(FIGURES[name])
    assert json.loads(json.dumps(made, allow_nan=False)) == made  # what the page carries is what was made
    go.Figure({"data": made["data"], "layout": made["layout"]})  # raises for one that does not exist


def texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in texts(item)]
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in texts(item)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("name", FIGURES)
def test_no_name_is_read_as_markup(name: str) -> None:
    found = [text for text in texts(to_plotly(FIGURES[name])) if "x_1" in text]
    assert all("<b>" not in text and "&lt;b&gt;" in text for text in found)
    assert bool(found) is (name in ("curves", "heatmap", "bars"))


@pytest.mark.parametrize("kind", PICTURE_FORMATS)
@pytest.mark.parametrize("name", FIGURES)
def test_the_same_figure_is_the_same_file(name: str, kind: str, tmp_path: Path) -> None:
    for place in ("one", "two"):
        draw(FIGURES[name], tmp_path / place, kind)
    content = (tmp_path / "one").read_bytes()
    assert content == (tmp_path / "two").read_bytes()
    assert content.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[kind])


def test_a_picture_shows_its_lines_in_the_colours_of_the_page(tmp_path: Path) -> None:
    from PIL import Image

    draw(FIGURES["curves"], tmp_path / "x", "png")
    pixels = np.asarray(Image.open(io.BytesIO((tmp_path / "x").read_bytes())).convert("RGB")).reshape(-1, 3)
    for trace in (trace for trace in to_plotly(FIGURES["curves"])["data"] if trace.get("mode") == "lines"):
        if trace["line"].get("color"):
            wanted = np.array([int(trace["line"]["color"][place : place + 2], 16) for place in (1, 3, 5)])
            assert (np.abs(pixels.astype(int) - wanted).sum(1) < 12).sum() > 50


@given(st.lists(st.floats(-5, 5).map(lambda value: round(value, 6)), min_size=2, max_size=10))
def test_labels_keep_apart_and_near(ends: list[float]) -> None:
    figure = Curves("x", "", tuple(Line(str(index), (0,), (end,)) for index, end in enumerate(ends)), log_y=False)
    low, high = figure.y_limits
    placed = [place for place in spread_labels(figure) if place is not None]
    shares = sorted((place - low) / (high - low) for place in placed)
    assert len(placed) == len(ends)
    assert all(after - before > LABEL_GAP - 1e-9 for before, after in pairwise(shares))
    assert shares[0] > -1e-9 and shares[-1] < 1 + 1e-9
    order = sorted(range(len(ends)), key=lambda index: ends[index])
    assert all(placed[a] <= placed[b] or ends[a] == ends[b] for a, b in pairwise(order))


def test_labels_that_are_far_apart_stay_at_their_ends() -> None:
    figure = Curves("x", "", (Line("a", (0, 1), (5.0, 0.0)), Line("b", (0, 1), (5.0, NAN)), Line("c", (), ())))
    assert spread_labels(figure) == [pytest.approx(0.0), pytest.approx(5.0), None]


def test_axes_hold_every_value() -> None:
    curves = FIGURES["decades"]
    assert isinstance(curves, Curves) and curves.is_log
    low, high = curves.y_limits
    assert 1e-5 < low < 1e-4 and high > 2.0  # not down to the band's edge at 1e-9
    signed, dots = FIGURES["signed"], FIGURES["dots"]
    assert isinstance(signed, Heatmap) and signed.color_limits == (-3.0, 3.0)
    assert isinstance(dots, Bars) and dots.x_limits[0] < 0.5 and dots.x_limits[1] > 3.0
    assert limits([]) == (0.0, 1.0) and limits([NAN, 2.0], zero=True)[0] == 0.0
    assert not Curves("x", "", (Line("a", (0, 1), (0.0, 100.0)),)).is_log  # zero has no logarithm


def test_long_names_lose_their_middle() -> None:
    assert shorten("short") == "short"
    assert len(shorten("x" * 500)) <= 34 and shorten("begin" + "x" * 500 + "end").endswith("end")
