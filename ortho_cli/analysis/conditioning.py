"""What `track_conditioning` left in a run, read back from its metrics: curves of each quantity, and the last values."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence

from ortho_cli.linalg.conditioning import Conditioning
from ortho_cli.methods.track_conditioning import MEASURED_AT

from .figure import Curves, Line
from .report import Part
from .run_folder import Run, Series
from .table import Table

__all__ = ["METHOD", "QUANTITIES", "conditioning_parts", "drawn", "picture", "spread_line", "tracked"]

METHOD = "method/track_conditioning/"
QUANTITIES = Conditioning._fields
TITLES = {
    "condition": "Condition number, with the ridge",
    "condition_resolved": "Condition number of what is resolved",
    "lambda_max": "Largest eigenvalue",
    "lambda_min": "Smallest eigenvalue",
    "effective_rank": "Effective rank",
    "rank": "Rank",
}
DECADES = {"condition", "condition_resolved", "lambda_max", "lambda_min"}  # at 0 or infinity a curve has a gap
MAX_LINES = 10
NOTE = (
    "Of the covariance of a layer's channels. That of a singular one has no condition number but the largest "
    "eigenvalue over the ridge, which is a matter of scale; ranks and the condition of what is resolved are free of it."
)

Tracked = dict[str, dict[str, Series]]


def tracked(run: Run) -> Tracked:
    """The quantities of each layer of a run, over the steps they were measured at; none where it tracked none."""
    measured_at = run.metrics.get(METHOD + MEASURED_AT)
    if measured_at is None:
        return {}
    found: Tracked = {}
    for name, series in run.metrics.items():
        layer, _, quantity = name.removeprefix(METHOD).rpartition("/")
        if name.startswith(METHOD) and layer and quantity in QUANTITIES:
            found.setdefault(layer, {})[quantity] = _as_measured(series, measured_at)
    return found


def _as_measured(series: Series, measured_at: Series) -> Series:
    """Lines of the log between two measurements repeat the earlier one: each counts once, where it was made."""
    points = dict(zip(map(int, measured_at.values), series.values, strict=True))
    return Series(tuple(points), tuple(points.values()))


def conditioning_parts(run: Run) -> Iterator[Part]:
    """A run's own curves, a line a layer, and its last values; nothing where it tracked nothing."""
    layers = tracked(run)
    if not layers:
        return
    yield NOTE
    kept = sorted(layers, key=lambda name: _last_condition(layers[name]), reverse=True)[:MAX_LINES]
    few = "" if len(kept) == len(layers) else f"The {MAX_LINES} of {len(layers)} layers with the largest condition."
    for quantity in TITLES:
        lines = [spread_line(name, [layers[name][quantity]], quantity) for name in layers if name in kept]
        if drawn(lines):
            yield picture(quantity, lines, of=kept[0] if len(layers) == 1 else "", note=few)
    rows = tuple((name, *(_cell(found[key].final) for key in QUANTITIES)) for name, found in layers.items())
    yield Table("conditioning", "At the end", ("layer", *map(_words, QUANTITIES)), rows)


def spread_line(label: str, several: Sequence[Series], quantity: str, place: int | None = None) -> Line:
    """The median over runs at each step, in a band from the lowest to the highest."""
    by_step: dict[int, list[float]] = {}
    for series in several:
        for step, value in zip(series.steps, series.values, strict=True):
            shown = by_step.setdefault(step, [])
            if math.isfinite(value) and (value > 0 or quantity not in DECADES):
                shown.append(value)
    steps = tuple(sorted(by_step))
    middle = tuple(statistics.median(by_step[step] or [math.nan]) for step in steps)
    if len(several) == 1:
        return Line(label, steps, middle, place=place)
    low, high = (tuple(pick(by_step[step], default=math.nan) for step in steps) for pick in (min, max))
    return Line(label, steps, middle, low, high, place=place)


def drawn(lines: Sequence[Line]) -> bool:
    """Whether there is a change to be seen, or a difference between lines."""
    return len({value for line in lines for value in line.y if math.isfinite(value)}) > 1


def picture(quantity: str, lines: Sequence[Line], *, name: str = "", of: str = "", note: str = "") -> Curves:
    """One quantity over training; `of` a layer, in a file of this name."""
    log = None if quantity in DECADES else False
    title = f"{TITLES[quantity]}, {of}" if of else TITLES[quantity]
    return Curves(name or f"conditioning-{quantity}", title, tuple(lines), log_y=log, note=note)


def _last_condition(found: Mapping[str, Series]) -> float:
    value = found["condition"].final
    return value if math.isfinite(value) else math.inf


def _cell(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _words(quantity: str) -> str:
    return quantity.replace("_", " ")
