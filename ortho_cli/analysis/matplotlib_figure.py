"""A figure as a picture file: PNG, SVG or PDF, drawn by matplotlib without a screen, the same bytes each time."""

from __future__ import annotations

import math
import textwrap
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .figure import Bars, Curves, Figure, Heatmap, shorten, spread_labels
from .style import DOTS_PER_INCH, INK, SCALES, color, dash

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

__all__ = ["PICTURE_FORMATS", "draw"]

PICTURE_FORMATS = ("png", "svg", "pdf")
WIDTH, CURVE_HEIGHT, ROW_HEIGHT, ROOM = 6.4, 3.3, 0.3, 1.1  # inches
MAP_HEIGHT, BELOW = 4.3, 0.2  # of a heatmap without names; the line under it, as a share of the matrix's height
MAX_HEIGHT = 16.0
LABEL_WIDTH = 60  # characters of a line below a heatmap
TICK_ROOM = 45  # characters that fit below a heatmap side by side
DRAWN = {"solid": "-", "dash": (0, (5, 2)), "dot": (0, (1, 1.5))}
# Without dates the same figure gives the same file.
METADATA: dict[str, dict[str, None]] = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
_INK = INK["light"]
STYLE: Any = {
    "font.size": 9.5, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.titlepad": 10, "axes.labelsize": 9, "axes.labelcolor": _INK["faint"], "axes.edgecolor": _INK["grid"],
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "text.color": _INK["text"],
    "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": _INK["grid"],
    "grid.linewidth": 0.8, "xtick.color": _INK["faint"], "ytick.color": _INK["faint"], "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5, "ytick.major.size": 0, "ytick.minor.size": 0, "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round", "svg.hashsalt": "ortho", "text.parse_math": False,
}  # fmt: skip


def draw(figure: Figure, path: Path, kind: str) -> None:
    """Draw a figure into the file at `path`, as one of `PICTURE_FORMATS`."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a name in a script that the font lacks
        canvas = Canvas(figsize=(WIDTH, _height(figure)), layout="constrained")
        FigureCanvasAgg(canvas)
        if isinstance(figure, Heatmap) and figure.below:
            axes, line = canvas.subplots(2, 1, sharex=True, height_ratios=(1, BELOW))
            _below(line, figure)
        else:
            axes, line = canvas.add_subplot(), None
        axes.set_title(figure.title)
        if isinstance(figure, Curves):
            _curves(axes, figure)
        elif isinstance(figure, Heatmap):
            _heatmap(canvas, axes, figure, line)
        else:
            _bars(axes, figure)
        engine = canvas.get_layout_engine()
        assert engine is not None
        engine.execute(canvas)  # once: drawing would do it twice
        canvas.set_layout_engine("none")
        canvas.savefig(path, format=kind, dpi=DOTS_PER_INCH, metadata=METADATA[kind])


def _height(figure: Figure) -> float:
    if isinstance(figure, Curves):
        return CURVE_HEIGHT
    if isinstance(figure, Heatmap) and figure.ends:
        return MAP_HEIGHT
    count = len(figure.rows) if isinstance(figure, Heatmap) else len(figure.names)
    return min(max(ROW_HEIGHT * count, 4 * ROW_HEIGHT) + ROOM, MAX_HEIGHT)


def _curves(axes: Axes, figure: Curves) -> None:
    low, high = figure.y_limits
    axes.set_yscale("log" if figure.is_log else "linear")
    axes.set_ylim(low, high)
    labels = spread_labels(figure) if len(figure.lines) > 1 else [None] * len(figure.lines)
    for index, (line, label) in enumerate(zip(figure.lines, labels, strict=True)):
        place = index if line.place is None else line.place
        drawn = sum(math.isfinite(value) for value in line.y)
        style: dict[str, Any] = {"linestyle": DRAWN[dash(place)]} if drawn > 1 else {"marker": "o", "linestyle": "none"}
        axes.plot(line.x, line.y, color=color(place), **style)
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=color(place), alpha=0.2, linewidth=0)
        if line.mark is not None:
            x, y, _ = line.mark
            axes.plot([x], [y], marker="o", markersize=6.5, markerfacecolor=_INK["paper"], color=color(place))
        if label is not None:
            beside = axes.get_yaxis_transform()
            axes.text(1.015, label, shorten(line.name), transform=beside, color=color(place), va="center")
    axes.margins(x=0.01)
    axes.set_xlabel(figure.x_label)
    axes.set_ylabel(figure.y_label)
    if figure.is_log:
        axes.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
        if high / low > 10:
            axes.yaxis.set_minor_formatter(lambda value, place: "")


def _heatmap(canvas: Canvas, axes: Axes, figure: Heatmap, line: Axes | None) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    values = [[math.nan if value is None else value for value in row] for row in figure.values]
    low, high = figure.color_limits
    colors = LinearSegmentedColormap.from_list("house", list(SCALES[figure.scale_name]["light"]))
    image = axes.imshow(values, cmap=colors, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    for axis, names, most in ((axes.xaxis, figure.columns, 12), (axes.yaxis, figure.rows, 60)):
        every = -(-len(names) // most) or 1
        shown = [shorten(name) for name in names[::every]]
        upright = axis is axes.xaxis and sum(map(len, shown)) > TICK_ROOM
        axis.set_ticks(range(0, len(names), every), shown, rotation=90 if upright else 0)
    if figure.ends:
        last = len(figure.rows) - 1
        axes.set_yticks([0.12 * last, 0.88 * last], figure.ends, rotation=90, va="center")
    if figure.cell_format is not None:
        middle = (low + high) / 2
        for row, numbers in enumerate(values):
            for column, value in enumerate(numbers):
                if math.isfinite(value):
                    shade = _INK["paper"] if not figure.diverging and value > middle else _INK["text"]
                    text = format(value, figure.cell_format)
                    axes.text(column, row, text, ha="center", va="center", color=shade, fontsize=8)
    (axes if line is None else line).set_xlabel(textwrap.fill(figure.x_label, LABEL_WIDTH))
    axes.set_ylabel(figure.y_label)
    if line is not None:
        axes.tick_params(axis="x", labelbottom=False, length=0)
    bar = canvas.colorbar(image, ax=axes, fraction=0.03, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label(figure.value_label)


def _below(axes: Axes, figure: Heatmap) -> None:
    """The line under a heatmap, on the same columns."""
    values = [math.nan if value is None else value for value in figure.below]
    axes.plot(range(len(values)), values, color="black", marker="o" if len(values) == 1 else None)
    axes.set_ylim(figure.line_limits)
    axes.set_ylabel(figure.below_label, rotation=0, ha="right", va="center")


def _bars(axes: Axes, figure: Bars) -> None:
    places = range(len(figure.names))
    axes.set_xlim(figure.x_limits)
    axes.grid(False, axis="y")
    axes.grid(True, axis="x")
    if figure.from_zero:
        axes.barh(places, figure.values, height=0.62, color=color(0))
    else:
        axes.plot(figure.values, places, "o", color=color(0), markersize=7)
    if figure.errors is not None:
        axes.errorbar(figure.values, places, xerr=figure.errors, fmt="none", ecolor=_INK["faint"], capsize=3, lw=1.2)
    for place, points in zip(places, figure.points or (), strict=False):
        axes.plot(points, [place] * len(points), "o", color=color(1), markersize=4, alpha=0.75)
    axes.set_yticks(places, [shorten(name) for name in figure.names])
    axes.tick_params(axis="y", labelcolor=_INK["text"])
    axes.set_ylim(len(figure.names) - 0.5, -0.5)
    for place, value in zip(places, figure.values, strict=True):
        beside = axes.get_yaxis_transform()
        axes.text(1.015, place, format(value, figure.value_format), transform=beside, va="center")
    axes.set_xlabel(figure.value_label)
