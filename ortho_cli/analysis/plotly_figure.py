"""A figure as plotly's JSON: traces and layout, without the colours of a theme, which the page adds (`page.js`)."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

from .figure import Bars, Curves, Figure, Heatmap, Line, shorten, spread_labels
from .style import color, dash

__all__ = ["to_plotly"]

CURVE_HEIGHT = 300  # pixels, as all below
ROW_HEIGHT, MIN_ROW_HEIGHT, ROOM, MAX_HEIGHT = 30, 14, 96, 900
CHARACTER = 7.5  # width of one in a wide font
TOP = 26  # for the buttons, which come with the mouse
BAND = "33"  # opacity of a band, in hexadecimal
CELLS_WITH_GAPS = 900  # above it lines between cells are most of what one sees
MAP_HEIGHT, BELOW = 400, 0.16  # of a heatmap without names; the line under it, as a share of the whole


def to_plotly(figure: Figure) -> dict[str, Any]:
    """What `Plotly.newPlot` takes (`data`, `layout`), and `meta` for the page: the height, and the kind of colours.

    Text of the caller's is escaped: plotly reads tags in it.
    """
    if isinstance(figure, Curves):
        return _curves(figure)
    return _heatmap(figure) if isinstance(figure, Heatmap) else _bars(figure)


def _curves(figure: Curves) -> dict[str, Any]:
    traces = []
    log, (low, high) = figure.is_log, figure.y_limits
    for index, line in enumerate(figure.lines):
        place = index if line.place is None else line.place
        if line.low is not None and line.high is not None:
            traces.append(_band(line, color(place), low if log else -math.inf))
        traces.append(_line(line, place))
        if line.mark is not None:
            traces.append(_mark(*line.mark, color(place)))
    names = [shorten(line.name) for line in figure.lines]
    notes = []
    if len(figure.lines) > 1:
        for index, (line, height) in enumerate(zip(figure.lines, spread_labels(figure), strict=True)):
            if height is not None:
                shade = color(index if line.place is None else line.place)
                notes.append(_label(names[index], math.log10(height) if log else height, shade))
    layout = {
        "hovermode": "x unified",
        "margin": {"l": 58, "r": _width(names) if notes else 16, "t": TOP, "b": 46},
        "xaxis": {"title": {"text": _safe(figure.x_label)}, "showgrid": False, "zeroline": False, "nticks": 6},
        "yaxis": {
            "title": {"text": _safe(figure.y_label)}, "zeroline": False, "type": "log" if log else "linear",
            "range": [math.log10(low), math.log10(high)] if log else [low, high], "nticks": 6,
            **({"dtick": 1} if log and high / low > 10 else {}),
        },
        "annotations": notes,
        "showlegend": False,
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
    }  # fmt: skip
    return {"data": traces, "layout": layout, "meta": {"height": CURVE_HEIGHT, "labelled": bool(notes)}}


def _line(line: Line, place: int) -> dict[str, Any]:
    drawn = sum(math.isfinite(value) for value in line.y)
    return {
        "type": "scatter",
        "mode": "lines" if drawn > 1 else "markers",
        "name": _safe(line.name),
        "x": list(line.x),
        "y": _plain(line.y),
        "line": {"color": color(place), "width": 2, "dash": dash(place)},
        "hovertemplate": "%{fullData.name}: %{y:.4~g}<extra></extra>",
    }


def _band(line: Line, shade: str, floor: float) -> dict[str, Any]:
    """The band of a line; a logarithmic axis has no place for what is below its floor."""
    assert line.low is not None and line.high is not None
    edges = [
        (x, max(low, floor), high)
        for x, low, high in zip(line.x, line.low, line.high, strict=True)
        if math.isfinite(low) and math.isfinite(high)
    ]
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [x for x, _, _ in edges] + [x for x, _, _ in reversed(edges)],
        "y": [low for _, low, _ in edges] + [high for _, _, high in reversed(edges)],
        "fill": "toself",
        "fillcolor": shade + BAND,
        "line": {"width": 0},
        "hoverinfo": "skip",
        "showlegend": False,
    }


def _mark(x: float, y: float, text: str, shade: str) -> dict[str, Any]:
    return {
        "type": "scatter", "mode": "markers", "x": [x], "y": [y], "name": _safe(text),
        "marker": {"size": 9, "symbol": "circle-open", "line": {"width": 2}, "color": shade},
        "hovertemplate": "%{fullData.name}<extra></extra>", "showlegend": False,
    }  # fmt: skip


def _label(text: str, y: float, shade: str) -> dict[str, Any]:
    return {
        "text": _safe(text), "x": 1, "xref": "paper", "xanchor": "left", "xshift": 6, "y": y, "yref": "y",
        "showarrow": False, "align": "left", "font": {"color": shade},
    }  # fmt: skip


def _heatmap(figure: Heatmap) -> dict[str, Any]:
    cells = len(figure.rows) * max(1, len(figure.columns))
    gap = 1 if cells <= CELLS_WITH_GAPS else 0
    trace: dict[str, Any] = {
        "type": "heatmap", "x": _names(figure.columns), "y": _names(figure.rows),
        "z": [_plain(row) for row in figure.values], "xgap": gap, "ygap": gap, "hoverongaps": False,
        "hovertemplate": "%{y}, %{x}: %{z:.4~g}<extra></extra>",
        "colorbar": {"thickness": 10, "outlinewidth": 0, "title": {"text": _safe(figure.value_label), "side": "right"}},
    }  # fmt: skip
    trace["zmin"], trace["zmax"] = figure.color_limits
    if figure.cell_format is not None:
        trace["texttemplate"] = f"%{{z:{figure.cell_format}}}"
    if figure.hover:
        trace["text"] = [[_safe(text) for text in row] for row in figure.hover]
        trace["hovertemplate"] = "%{y}, %{x}: %{z:.4~g}<br>%{text}<extra></extra>"
    layout: dict[str, Any] = {
        "margin": {"l": _width(figure.rows) + 16, "r": 10, "t": TOP, "b": 52},
        "xaxis": {"title": {"text": _safe(figure.x_label)}, "type": "category", "showgrid": False},
        "yaxis": {
            "title": {"text": _safe(figure.y_label)}, "type": "category", "autorange": "reversed", "showgrid": False,
        },
    }  # fmt: skip
    if figure.ends:
        layout["margin"]["l"] = 64
        layout["yaxis"] |= {
            "tickmode": "array", "tickangle": -90, "ticktext": [_safe(word) for word in figure.ends],
            "tickvals": [trace["y"][round(share * (len(figure.rows) - 1))] for share in (0.15, 0.85)],
        }  # fmt: skip
    height = MAP_HEIGHT if figure.ends else _height(len(figure.rows))
    traces = [trace, _below(figure, layout, trace)] if figure.below else [trace]
    return {"data": traces, "layout": layout, "meta": {"height": height, "scale": figure.scale_name}}


def _below(figure: Heatmap, layout: dict[str, Any], heat: dict[str, Any]) -> dict[str, Any]:
    """The line under a heatmap, on its columns; makes room for itself."""
    layout["yaxis"]["domain"] = [BELOW + 0.04, 1]
    layout["xaxis"]["anchor"] = "y2"
    layout["yaxis2"] = {
        "domain": [0, BELOW], "range": list(figure.line_limits), "nticks": 3, "zeroline": False,
        "title": {"text": _safe(figure.below_label)},
    }  # fmt: skip
    heat["colorbar"] |= {"len": 1 - BELOW, "y": 1, "yanchor": "top"}
    return {
        "type": "scatter", "mode": "lines" if len(figure.below) > 1 else "markers", "x": heat["x"], "yaxis": "y2",
        "y": _plain(figure.below), "line": {"color": "ink", "width": 2}, "name": _safe(figure.below_label),
        "hovertemplate": "%{x}: %{y:.4~g}<extra></extra>", "showlegend": False,
    }  # fmt: skip


def _bars(figure: Bars) -> dict[str, Any]:
    names = _names(figure.names)
    single = [value for points in figure.points or () for value in points]
    errors = {} if figure.errors is None else {"error_x": {"array": list(figure.errors), "thickness": 1.5, "width": 4}}
    shown = {"x": list(figure.values), "y": names, "hovertemplate": "%{y}: %{x:.4~g}<extra></extra>", **errors}
    if figure.from_zero:
        main = {"type": "bar", "orientation": "h", "marker": {"color": color(0)}, "width": 0.62, **shown}
    else:
        main = {"type": "scatter", "mode": "markers", "marker": {"color": color(0), "size": 11}, **shown}
    traces = [main]
    if figure.points is not None:
        traces.append({
            "type": "scatter", "mode": "markers", "x": single,
            "y": [name for name, points in zip(names, figure.points, strict=True) for _ in points],
            "marker": {"color": color(1), "size": 6, "opacity": 0.75},
            "hovertemplate": "%{y}: %{x:.4~g}<extra></extra>",
        })  # fmt: skip
    texts = [format(value, figure.value_format) for value in figure.values]
    layout = {
        "margin": {"l": _width(figure.names) + 8, "r": _width(texts), "t": TOP, "b": 46},
        "xaxis": {
            "title": {"text": _safe(figure.value_label)}, "range": list(figure.x_limits), "zeroline": False,
            "nticks": 7,
        },
        "yaxis": {"type": "category", "autorange": "reversed", "showgrid": False},
        "annotations": [
            {"text": text, "x": 1, "xref": "paper", "xanchor": "left", "xshift": 6, "y": name, "showarrow": False}
            for text, name in zip(texts, names, strict=True)
        ],
        "showlegend": False,
    }  # fmt: skip
    return {"data": traces, "layout": layout, "meta": {"height": _height(len(names))}}


def _height(rows: int) -> int:
    return int(min(max(ROW_HEIGHT * rows, 4 * ROW_HEIGHT), max(MAX_HEIGHT, MIN_ROW_HEIGHT * rows))) + ROOM


def _width(names: Sequence[str]) -> int:
    return round(18 + CHARACTER * max((len(shorten(name)) for name in names), default=0))


def _names(names: Sequence[str]) -> list[str]:
    """Names as an axis shows them: short, where none of them becomes another's."""
    short = [shorten(name) for name in names]
    return [_safe(name) for name in (short if len(set(short)) == len(set(names)) else names)]


def _safe(text: str) -> str:
    return html.escape(text, quote=False)


def _plain(values: Iterable[float | None]) -> list[float | None]:
    """JSON has no inf and nan; null leaves a gap."""
    return [value if value is not None and math.isfinite(value) else None for value in values]
