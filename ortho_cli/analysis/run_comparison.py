"""Several runs beside each other, seeds together: which groups, which metrics, and the numbers for programs."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ortho_cli.errors import UsageError

from .run_folder import Run
from .run_groups import Group, Summary, group_runs, value_text

__all__ = ["Comparison", "compare_runs", "comparison_data"]


@dataclass(frozen=True)
class Comparison:
    """Runs in groups, and the metrics to look at.

    Attributes:
        groups: in the order of the runs.
        metrics: names, the first is the one that matters most.
        command: what made it, for the record.
        notes: what a reader should know.
    """

    groups: list[Group]
    metrics: list[str]
    command: str = "ortho analyze runs"
    notes: list[str] = field(default_factory=list)


def compare_runs(
    runs: Sequence[Run], *, metrics: Sequence[str] = (), by: Sequence[str] = (), command: str = "ortho analyze runs"
) -> Comparison:
    """Group runs and choose what to show.

    Args:
        runs: at least one.
        metrics: names or patterns (`method/hra/*`); none: all that is evaluated, and the training loss.
        by: keys to group by, in place of all.
        command: what the tables say they were made by.

    Raises:
        UsageError: a metric or a key that no run has.
    """
    known = list(dict.fromkeys(name for run in runs for name in run.metrics))
    chosen = _chosen(metrics, known) if metrics else _usual(runs, known)
    groups = group_runs(runs, by)
    return Comparison(groups, chosen, command, list(_notes(groups, chosen)))


def _chosen(metrics: Sequence[str], known: Sequence[str]) -> list[str]:
    found: list[str] = []
    for pattern in metrics:
        matched = fnmatch.filter(known, pattern)
        if not matched:
            near = [name for name in known if name.rpartition("/")[2] == pattern] or sorted(known)
            raise UsageError(f"--metric {pattern}: no run has it", hint=f"one of {', '.join(near)}")
        found += matched
    return list(dict.fromkeys(found))


def _usual(runs: Sequence[Run], known: Sequence[str]) -> list[str]:
    """What the recipes call best, then all that is evaluated, the losses last."""
    best = [run.recipe.run.best.metric for run in runs if run.recipe.run.best is not None]
    evaluated = sorted(name for name in known if name.startswith("eval/"))
    evaluated.sort(key=lambda name: name == "eval/loss")
    return [name for name in dict.fromkeys([*best, *evaluated, "train/loss"]) if name in known]


def _notes(groups: Sequence[Group], metrics: Sequence[str]) -> Iterator[str]:
    for group in groups:
        for run in group.runs:
            if not run.is_finished:
                yield f"{run.title} is not finished: its last step so far is {run.step:,}"
        for seed in sorted({seed for seed in group.seeds if group.seeds.count(seed) > 1}):
            names = ", ".join(run.title for run in group.runs if run.recipe.train.seed == seed)
            yield f"{group.label}: {names} have the same seed {seed}, so their spread is none over seeds"
        for metric in metrics:
            lacking = [run.title for run in group.runs if metric not in run.metrics]
            if lacking and len(lacking) < len(group.runs):
                yield f"{group.label}: {metric} is missing from {', '.join(lacking)}"
        last = {run.step for run in group.runs}
        if len(last) > 1:
            yield f"{group.label}: the runs end at different steps ({', '.join(f'{step:,}' for step in sorted(last))})"


def comparison_data(comparison: Comparison) -> dict[str, Any]:
    """The comparison for programs."""
    return {
        "command": "analyze runs",
        "details": [_group_data(group, comparison.metrics) for group in comparison.groups],
        "totals": {
            "runs": sum(len(group.runs) for group in comparison.groups),
            "groups": len(comparison.groups),
            "metrics": comparison.metrics,
        },
        "notes": comparison.notes,
    }


def _group_data(group: Group, metrics: Sequence[str]) -> dict[str, Any]:
    found = {
        metric: {"final": _summary_data(group.final(metric)), "best": _summary_data(group.best(metric))}
        for metric in metrics
        if group.series(metric)
    }
    return {
        "name": group.label, "runs": [run.title for run in group.runs], "seeds": list(group.seeds),
        "recipe": {key: value_text(value) for key, value in group.values.items()}, "trainable": group.trained,
        "metrics": found,
    }  # fmt: skip


def _summary_data(summary: Summary | None) -> dict[str, Any] | None:
    if summary is None:
        return None

    def plain(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    return {"mean": plain(summary.mean), "sd": plain(summary.sd), "values": [plain(value) for value in summary.values]}
