"""Figures as data: what is shown, once, for both the interactive page and the printed picture.

A figure knows no library. `plotly_figure` and `matplotlib_figure` draw it, with axes and label places decided here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .style import LABEL_GAP

__all__ = ["Bars", "Curves", "Figure", "Heatmap", "Line", "limits", "shorten", "spread_labels"]

Numbers = Sequence[float]
LOG_SPAN = 50.0  # positive values that span more than this are read better in decades
PADDING = 0.04  # of the span, above and below the values
MAX_LABEL = 34  # characters of a name beside a line


@dataclass(frozen=True)
class Line:
    """One series of a :class:`Curves`.

    Attributes:
        name: beside its end.
        x, y: as many of one as of the other; values that are not finite leave a gap.
        low, high: the edges of a band around it.
        place: in the palette; None: by its order in the figure.
        mark: a point to stress, and what it is.
    """

    name: str
    x: Numbers
    y: Numbers
    low: Numbers | None = None
    high: Numbers | None = None
    place: int | None = None
    mark: tuple[float, float, str] | None = None


@dataclass(frozen=True)
class Curves:
    """Values over a number, usually the step.

    Attributes:
        name: of its files, e.g. `eval-loss`.
        title: above it.
        lines: the series.
        log_y: None: where all values are positive and span more than `LOG_SPAN`.
        from_zero: the vertical axis begins at zero.
        note: one sentence below it.
    """

    name: str
    title: str
    lines: tuple[Line, ...]
    x_label: str = "step"
    y_label: str = ""
    log_y: bool | None = None
    from_zero: bool = False
    note: str = ""

    @property
    def is_log(self) -> bool:
        """Whether the vertical axis is logarithmic."""
        if self.log_y is not None:
            return self.log_y
        values = _finite(value for line in self.lines for value in line.y)
        return bool(values) and min(values) > 0 and max(values) / min(values) > LOG_SPAN

    @property
    def y_limits(self) -> tuple[float, float]:
        """The ends of the vertical axis, bands included; in decades a band's lower edge may run out of the picture."""
        lows = () if self.is_log else tuple(line.low or () for line in self.lines)
        parts = [*lows, *(numbers for line in self.lines for numbers in (line.y, line.high or ()))]
        return limits((value for numbers in parts for value in numbers), log=self.is_log, zero=self.from_zero)


@dataclass(frozen=True)
class Heatmap:
    """A matrix of values by colour.

    Attributes:
        rows, columns: their names.
        values: a row a name; None leaves a cell empty.
        low, high: the ends of the colours; None: the smallest and largest value.
        diverging: colours that part at the middle, for signed values.
        scale: the colours by name, of `style.SCALES`; "" for what `diverging` says.
        below: a line under the matrix, one value a column, and `below_label` and `below_limits` of its axis.
        ends: two words, beside the first rows and the last, in place of the names of all.
        hover: for each cell what the page says of it besides its value.
        cell_format: of the numbers in the cells, e.g. `".2f"`; None: no numbers.
    """

    name: str
    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    x_label: str = ""
    y_label: str = ""
    value_label: str = ""
    low: float | None = None
    high: float | None = None
    diverging: bool = False
    cell_format: str | None = None
    note: str = ""
    scale: str = ""
    below: tuple[float | None, ...] = ()
    below_label: str = ""
    below_limits: tuple[float, float] | None = None
    ends: tuple[str, str] | None = None
    hover: tuple[tuple[str, ...], ...] = ()

    @property
    def scale_name(self) -> str:
        """The colours, a key of `style.SCALES`."""
        return self.scale or ("diverging" if self.diverging else "sequential")

    @property
    def line_limits(self) -> tuple[float, float]:
        """The ends of the axis of the line below."""
        return self.below_limits or limits(value for value in self.below if value is not None)

    @property
    def color_limits(self) -> tuple[float, float]:
        """The values of the first and the last colour; as far from zero as each other where the colours part there."""
        found = _finite(value for row in self.values for value in row if value is not None) or [0.0, 1.0]
        low, high = min(found), max(found)
        if self.diverging:
            low, high = -max(abs(low), abs(high)), max(abs(low), abs(high))
        low, high = low if self.low is None else self.low, high if self.high is None else self.high
        return (low, high) if low < high else (low, low + 1.0)


@dataclass(frozen=True)
class Bars:
    """One value a name, with its spread, and the single values it is the mean of.

    Attributes:
        names: from the top.
        values: one each.
        errors: half the length of a line through the end of each bar.
        points: single values, as dots.
        from_zero: bars; else only dots on an axis that need not reach zero.
        value_format: of the number beside each.
    """

    name: str
    title: str
    names: tuple[str, ...]
    values: tuple[float, ...]
    errors: tuple[float, ...] | None = None
    points: tuple[tuple[float, ...], ...] | None = None
    from_zero: bool = True
    value_label: str = ""
    value_format: str = ".4g"
    note: str = ""

    @property
    def x_limits(self) -> tuple[float, float]:
        """The ends of the horizontal axis, spreads and points included."""
        errors = self.errors or (0.0,) * len(self.values)
        ends = [value + sign * error for value, error in zip(self.values, errors, strict=True) for sign in (-1, 1)]
        return limits([*ends, *(value for points in self.points or () for value in points)], zero=self.from_zero)


Figure = Curves | Heatmap | Bars


def limits(values: Iterable[float], *, log: bool = False, zero: bool = False) -> tuple[float, float]:
    """The ends of an axis that shows all values with a little room.

    >>> limits([0.0, 1.0])
    (-0.04, 1.04)
    >>> limits([3.0, 3.0], zero=True), limits([0.0], zero=True)
    ((0.0, 3.12), (0.0, 1.04))
    """
    found = _finite(values)
    if log:
        found = [math.log10(value) for value in found if value > 0]
    if not found:
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = min(found), max(found)
    if zero:
        low, high = min(0.0, low), max(0.0, high)
        high = high if low or high else 1.0
    span = (high - low) or abs(high) * 0.2 or 1.0
    low = low if zero and low == 0.0 else low - PADDING * span
    high = high if zero and high == 0.0 else high + PADDING * span
    return (10**low, 10**high) if log else (low, high)


def spread_labels(figure: Curves) -> list[float | None]:
    """Where the names beside the lines stand, so that none covers another.

    Returns:
        For each line a value on the vertical axis, as near its last point as the others allow; None for an empty line.
    """
    low, high = figure.y_limits
    scale = math.log10 if figure.is_log else float

    def share(value: float) -> float:
        return (scale(value) - scale(low)) / (scale(high) - scale(low))

    ends: dict[int, float] = {}
    for index, line in enumerate(figure.lines):
        drawn = [value for value in line.y if math.isfinite(value) and (value > 0 or not figure.is_log)]
        if drawn:
            ends[index] = share(drawn[-1])
    order = sorted(ends, key=lambda index: ends[index])
    places = _apart([ends[index] for index in order], LABEL_GAP)
    span = scale(high) - scale(low)
    found: list[float | None] = [None] * len(figure.lines)
    for index, place in zip(order, places, strict=True):
        value = scale(low) + place * span
        found[index] = 10**value if figure.is_log else value
    return found


def _apart(places: list[float], gap: float) -> list[float]:
    """Ascending places in [0, 1], moved as little as possible to be `gap` apart (pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []  # the sum of wanted first places, and how many stand in the block
    for index, place in enumerate(places):
        total, count = place - index * gap, 1
        while blocks and blocks[-1][0] / blocks[-1][1] > total / count:
            earlier = blocks.pop()
            total, count = total + earlier[0], count + earlier[1]
        blocks.append((total, count))
    highest = max(0.0, 1.0 - (len(places) - 1) * gap)
    starts = [min(max(total / count, 0.0), highest) for total, count in blocks for _ in range(count)]
    return [start + index * gap for index, start in enumerate(starts)]


def shorten(text: str, length: int = MAX_LABEL) -> str:
    """A name that fits beside a line; its middle goes.

    >>> shorten("a" * 20 + "b" * 20, 9)
    'aaaa…bbbb'
    """
    if len(text) <= length:
        return text
    kept = length - 1
    return text[: (kept + 1) // 2] + "…" + text[len(text) - kept // 2 :]


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]
