"""How well conditioned layers are over the training of several runs, seeds together, beside what the runs reached."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from ortho_cli.errors import CheckpointError

from .conditioning import NOTE, QUANTITIES, TITLES, drawn, picture, spread_line, tracked
from .metric_names import metric_title, number_format, scale, slug
from .report import Fact, Part, Report
from .run_folder import Run, Series
from .run_groups import Group, group_runs
from .run_report import headline
from .table import Spread, Table, cell_text

__all__ = ["MARK", "conditioning_report"]

MARK = "conditioning.csv"  # by which an earlier report is known
MAX_FACTS = 4
BAND = "Median over runs; the band reaches from the lowest to the highest."
TABLE_NOTE = "Medians over n runs at their last step; – is infinite. Metrics are mean ± sample standard deviation."


def conditioning_report(runs: Sequence[Run], *, by: Sequence[str] = (), command: str) -> Report:
    """Describe runs that were trained with the method `track_conditioning`.

    Args:
        runs: at least one; those that differ by their seed alone are one group.
        by: dotted keys of recipes to group by instead.
        command: what made the report, for the record.

    Raises:
        CheckpointError: a run that tracked nothing.
        UsageError: a key that no run has.
    """
    for run in runs:
        if not tracked(run):
            raise CheckpointError(
                f"{run.title} has no measurements of conditioning",
                hint="train with the method {name: track_conditioning}",
                where=str(run.folder),
            )
    groups = group_runs(runs, by)
    layers = list(dict.fromkeys(layer for run in runs for layer in tracked(run)))
    notes = [
        f"{run.title} is not finished: its last step so far is {run.step:,}" for run in runs if not run.is_finished
    ]
    final = _final_table(groups, layers)
    kinds = "1 group" if len(groups) == 1 else f"{len(groups)} groups"
    subtitle = f"{len(runs)} {'run' if len(runs) == 1 else 'runs'} in {kinds}, {', '.join(layers)}"
    report = Report("Conditioning of covariances", subtitle, tuple(_facts(groups, layers[0])), name="conditioning")
    report.section("At the end", [NOTE, final, *notes])
    if len(groups) == 1:
        report.section("Over training", _over_training({layer: _series(groups[0], layer) for layer in layers}, ""))
    else:
        for layer in layers:
            lines = {group.label: _series(group, layer) for group in groups}
            report.section(f"Over training: {layer}", _over_training(lines, layer))
    report.further = (_table(groups),)
    report.data = {
        "command": "analyze conditioning", "told": command,
        "details": [_data(group, layer) for group in groups for layer in layers if _series(group, layer)],
        "totals": {"runs": len(runs), "groups": len(groups), "layers": layers}, "notes": notes,
    }  # fmt: skip
    return report


def _series(group: Group, layer: str) -> dict[str, list[Series]]:
    """Each quantity of a layer, in every run of the group that has it."""
    found = [tracked(run)[layer] for run in group.runs if layer in tracked(run)]
    return {key: [each[key] for each in found] for key in QUANTITIES} if found else {}


def _over_training(lines: dict[str, dict[str, list[Series]]], layer: str) -> Iterator[Part]:
    for quantity in TITLES:
        found = [
            spread_line(label, several[quantity], quantity, place)
            for place, (label, several) in enumerate(lines.items())
            if several
        ]
        if drawn(found):
            name = slug("/".join(filter(None, ["conditioning", layer, quantity])))
            yield picture(quantity, found, name=name, of=layer, note=BAND if any(line.low for line in found) else "")


def _facts(groups: Sequence[Group], layer: str) -> Iterator[Fact]:
    """The last condition numbers of the first layer."""
    for group in groups if len(groups) <= MAX_FACTS else ():
        median = _median(_series(group, layer).get("condition", []))
        if median is not None:
            yield Fact(cell_text(median), f"condition of {layer}, {group.label}")


def _final_table(groups: Sequence[Group], layers: Sequence[str]) -> Table:
    metrics = list(dict.fromkeys(name for group in groups for name in headline(group.runs[0])[:1]))
    rows: list[tuple[object, ...]] = []
    for group in groups:
        reached = [_reached(group, metric) for metric in metrics]
        for layer in layers:
            found = _series(group, layer)
            if found:
                values = [_median(found[key]) for key in QUANTITIES]
                rows.append((group.label, layer, len(found["condition"]), *values, *reached))
    words = (key.replace("_", " ") for key in QUANTITIES)
    headers = ("group", "layer", "n", *words, *(metric_title(metric, unit=True) for metric in metrics))
    return Table("table", "", headers, tuple(rows), note=TABLE_NOTE)


def _reached(group: Group, metric: str) -> Spread | None:
    found = group.final(metric)
    if found is None:
        return None
    factor = scale(metric)
    sd = None if found.sd is None else found.sd * factor
    return Spread(found.mean * factor, sd, number_format(metric, [found.mean * factor]))


def _median(several: Sequence[Series]) -> float | None:
    """Of the last values; None where it is infinite, which logs cannot hold."""
    if not several:
        return None
    found = statistics.median(math.inf if math.isnan(series.final) else series.final for series in several)
    return found if math.isfinite(found) else None


def _table(groups: Sequence[Group]) -> Table:
    """Every measurement, as numbers."""
    rows = [
        (run.title, group.label, run.recipe.train.seed, layer, step, *_row(found, index))
        for group in groups
        for run in group.runs
        for layer, found in tracked(run).items()
        for index, step in enumerate(found["condition"].steps)
    ]
    return Table("conditioning", "", ("run", "group", "seed", "layer", "step", *QUANTITIES), tuple(rows))


def _row(found: dict[str, Series], index: int) -> list[float | None]:
    values = [found[key].values[index] for key in QUANTITIES]
    return [value if math.isfinite(value) else None for value in values]


def _data(group: Group, layer: str) -> dict[str, Any]:
    found = _series(group, layer)
    return {
        "name": group.label, "layer": layer, "runs": [run.title for run in group.runs], "seeds": list(group.seeds),
        "final": {key: {"median": _median(found[key]), "values": [_median([each]) for each in found[key]]}
                  for key in QUANTITIES},
    }  # fmt: skip
