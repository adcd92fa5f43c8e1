"""The results of one run as a table, for its report and its card."""

from __future__ import annotations

from .metric_names import better, metric_title, number_format, scale
from .run_folder import Run
from .table import Spread, Table

__all__ = ["results_table"]


def results_table(run: Run) -> Table:
    """Every evaluated metric, and the training loss: at the end, and at its best."""
    names = [*(name for name in run.metrics if name.startswith("eval/")), *({"train/loss"} & set(run.metrics))]
    rows = []
    for name in names:
        series = run.metrics[name]
        step, value = series.best(better(name))
        shown = (Spread(each * scale(name), None, number_format(name, [value])) for each in (series.final, value))
        rows.append((metric_title(name, unit=True), *shown, step))
    return Table("results", "Final and best values", ("metric", "final", "best", "at step"), tuple(rows))
