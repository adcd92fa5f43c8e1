"""The comparison of runs as a report: the page, the pictures, the tables, and `table.md` for a README."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from .figure import Bars, Curves, Line
from .metric_names import better, is_share, metric_title, metric_value, number_format, scale, slug
from .recipe_text import flat_recipe
from .report import Fact, Part, Report
from .run_comparison import Comparison, comparison_data
from .run_groups import Group, Summary, differing_keys, value_text
from .table import Spread, Table

__all__ = ["MARK", "comparison_report", "curve_table", "curves", "final_table", "markdown"]

MARK = "table.md"
MAX_FACTS = 4  # more groups than that are read in the table
TABLE_NOTE = "Mean ± sample standard deviation over n runs; best: each run's best evaluation, then the mean."


def comparison_report(comparison: Comparison) -> Report:
    """The page, the pictures and the tables of a comparison; `table.md` is for a README."""
    groups, metrics = comparison.groups, comparison.metrics
    count = sum(len(group.runs) for group in groups)
    runs = "1 run" if count == 1 else f"{count} runs"
    kinds = "1 group" if len(groups) == 1 else f"{len(groups)} groups"
    recipe = groups[0].runs[0].recipe
    subtitle = f"{runs} in {kinds}: {recipe.task.name} {recipe.data.name}"
    report = Report("Runs compared", subtitle, tuple(_facts(comparison)), name="runs")
    report.section("Results", [*_points(comparison), final_table(comparison), *comparison.notes])
    report.section("Over training", [curves(groups, metric) for metric in metrics])
    report.section("What the recipes differ in", _differences(groups))
    report.section("Runs", [_runs(comparison)])
    report.further = (curve_table(comparison),)
    report.data = comparison_data(comparison)
    report.texts[MARK] = markdown(comparison)
    return report


def _facts(comparison: Comparison) -> Iterator[Fact]:
    """The group that leads, where there is one to lead."""
    metric = comparison.metrics[0] if comparison.metrics else ""
    means = {group.label: found.mean for group in comparison.groups if (found := group.final(metric)) is not None}
    finite = {label: mean for label, mean in means.items() if math.isfinite(mean)}
    for label in sorted(finite, key=lambda label: finite[label], reverse=better(metric) == "max"):
        yield Fact(metric_value(metric, finite[label]), f"{metric_title(metric)}, {label}")
        if len(comparison.groups) > MAX_FACTS:
            return


def _points(comparison: Comparison) -> Iterator[Part]:
    """The final values, run by run, of the metric that matters most and of the evaluated loss."""
    if len(comparison.groups) < 2:
        return
    for metric in dict.fromkeys([*comparison.metrics[:1], *({"eval/loss"} & set(comparison.metrics))]):
        found = [(group, summary) for group in comparison.groups if (summary := group.final(metric)) is not None]
        finite = [(group, summary) for group, summary in found if math.isfinite(summary.mean)]
        if len(finite) > 1:
            yield _final_values(metric, finite)


def _final_values(metric: str, found: Sequence[tuple[Group, Summary]]) -> Bars:
    factor = scale(metric)
    values = tuple(summary.mean * factor for _, summary in found)
    many = any(len(summary.values) > 1 for _, summary in found)
    return Bars(
        f"final-{slug(metric)}", f"Final {metric_title(metric)}", tuple(group.label for group, _ in found), values,
        tuple((summary.sd or 0.0) * factor for _, summary in found) if many else None,
        tuple(tuple(value * factor for value in summary.values) for _, summary in found) if many else None,
        from_zero=False, value_label=metric_title(metric, unit=True), value_format=number_format(metric, values),
        note="Mean and sample standard deviation; small dots are the single runs." if many else "",
    )  # fmt: skip


def curves(groups: Sequence[Group], metric: str) -> Curves:
    """A metric over training: a line a group, and a band of one standard deviation where it has several runs."""
    lines = []
    for place, group in enumerate(groups):
        points = group.curve(metric)
        if not points:
            continue
        low = high = None
        if any(summary.sd is not None for _, summary in points):
            low = tuple(summary.mean - (summary.sd or 0.0) for _, summary in points)
            high = tuple(summary.mean + (summary.sd or 0.0) for _, summary in points)
        steps, means = tuple(step for step, _ in points), tuple(summary.mean for _, summary in points)
        lines.append(Line(group.label, steps, means, low, high, place=place))
    banded = any(line.low is not None for line in lines)
    note = "Mean over runs; the band is one standard deviation." if banded else ""
    log = False if is_share(metric) else None
    return Curves(slug(metric), metric_title(metric).capitalize(), tuple(lines), log_y=log, note=note)


def final_table(comparison: Comparison) -> Table:
    """One row a group: every metric at the end and, of what is evaluated, at its best, as mean and spread over runs."""
    formats = {metric: _format(comparison, metric) for metric in comparison.metrics}
    main = next((metric for metric in comparison.metrics if metric.startswith("eval/")), None)
    headers = ["group", "n"]
    for metric in comparison.metrics:
        headers.append(metric_title(metric, unit=True))
        if metric == main:
            headers.append(f"best {metric_title(metric, unit=True)}")
    rows = []
    for group in comparison.groups:
        row: list[object] = [group.label, len(group.runs)]
        for metric in comparison.metrics:
            row.append(_spread(group.final(metric), metric, formats[metric]))
            if metric == main:
                row.append(_spread(group.best(metric), metric, formats[metric]))
        rows.append((*row, group.trained))
    return Table("table", "At the end", (*headers, "trained parameters"), tuple(rows), note=TABLE_NOTE)


def _format(comparison: Comparison, metric: str) -> str:
    found = [group.final(metric) for group in comparison.groups]
    return number_format(metric, [summary.mean * scale(metric) for summary in found if summary is not None])


def _spread(summary: Summary | None, metric: str, number: str) -> Spread | None:
    if summary is None:
        return None
    factor = scale(metric)
    return Spread(summary.mean * factor, None if summary.sd is None else summary.sd * factor, number)


def _differences(groups: Sequence[Group]) -> Iterator[Part]:
    """The keys in which recipes differ, and only those; a group made by one key may hold several values of others."""
    keys = differing_keys([flat_recipe(run.recipe) for group in groups for run in group.runs])
    if not keys:
        yield "Nothing but the seed."
        return
    rows = []
    for group in groups:
        flat = [flat_recipe(run.recipe) for run in group.runs]
        cells = [", ".join(dict.fromkeys(value_text(recipe[key]) for recipe in flat if key in recipe)) for key in keys]
        rows.append((group.label, *(cell or None for cell in cells)))
    yield Table("differences", "", ("group", *keys), tuple(rows))


def _runs(comparison: Comparison) -> Table:
    """Every run by itself."""
    rows = []
    for group in comparison.groups:
        for run in group.runs:
            finals = [run.metrics[metric].final if metric in run.metrics else None for metric in comparison.metrics]
            seconds = round(float(run.outcome["seconds"]), 1) if run.is_finished else None
            rows.append((run.title, group.label, run.recipe.train.seed, run.step, *finals, seconds))
    return Table("runs", "", ("run", "group", "seed", "steps", *comparison.metrics, "seconds"), tuple(rows))


def curve_table(comparison: Comparison) -> Table:
    """The curves as numbers, one line a group, metric and step."""
    rows = [
        (group.label, metric, step, summary.mean, summary.sd, len(summary.values))
        for group in comparison.groups
        for metric in comparison.metrics
        for step, summary in group.curve(metric)
    ]
    return Table("curves", "", ("group", "metric", "step", "mean", "sd", "n"), tuple(rows))


def markdown(comparison: Comparison) -> str:
    """The table for a README: what it shows, how it was made."""
    seeds = sorted({seed for group in comparison.groups for seed in group.seeds})
    which = f" (seeds {', '.join(map(str, seeds))})" if len(seeds) > 1 else ""
    note = TABLE_NOTE.replace("n runs", f"n runs{which}")
    lines = [final_table(comparison).markdown(), note, *(f"- {note}" for note in comparison.notes)]
    return "\n".join([*lines, "", f"```bash\n{comparison.command}\n```", ""])
