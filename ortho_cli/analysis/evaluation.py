"""An evaluation: what was judged, the numbers, what had to be left out and how to get it; and its report.

What can be said of a task's outputs beyond its own metrics is a :class:`Judge`, found through the registry by the
task's name.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor

from ortho_cli import __version__

from .metric_names import metric_title, metric_value, number_format, scale
from .report import Code, Fact, Part, Report
from .table import Spread, Table

__all__ = [
    "MARK", "Evaluation", "Judge", "Metric", "Missing", "Skipped", "evaluation_data", "evaluation_report", "measure",
    "metric_table",
]  # fmt: skip

Outputs = TypeVar("Outputs")
MARK = "evaluation.json"
MAX_FACTS = 5


@dataclass(frozen=True)
class Metric(Generic[Outputs]):
    """A metric of a model's outputs, the library it needs beyond ours, and the command that fetches that."""

    compute: Callable[[Outputs], float]
    library: str | None = None
    command: str | None = None

    @property
    def is_there(self) -> bool:
        """Whether its library is installed."""
        return self.library is None or importlib.util.find_spec(self.library) is not None


@dataclass(frozen=True)
class Judge(Generic[Outputs]):
    """What is looked at in the outputs of one task.

    Attributes:
        own: names of the metrics that the task itself computes.
        target: the key of a batch that the outputs are compared with.
        collect: makes, of the task, all outputs `(N, ...)` and all targets `(N, ...)`, what the others take.
        metrics: by name.
        parts: figures and tables.
        data: what `evaluation.json` holds beyond the metrics.
        texts: further files, by name.
    """

    own: tuple[str, ...]
    target: str
    collect: Callable[[Any, Tensor, Tensor], Outputs]
    metrics: Mapping[str, Metric[Outputs]]
    parts: Callable[[Outputs], Iterable[Part]]
    data: Callable[[Outputs], dict[str, Any]]
    texts: Callable[[Outputs], dict[str, str]] = lambda outputs: {}


@dataclass(frozen=True)
class Skipped:
    """A metric that was left out."""

    metric: str
    reason: str
    command: str | None = None

    def __str__(self) -> str:
        return f"{self.metric} is skipped: {self.reason}" + (f"; {self.command}" if self.command else "")


class Missing(Exception):
    """A library or weights that a metric needs are not there; who computes metrics makes it a `Skipped`.

    Args:
        reason: e.g. `lpips is not installed`.
        command: that fetches it.
    """

    def __init__(self, reason: str, command: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.command = command


@dataclass
class Evaluation:
    """What `ortho evaluate` found.

    Attributes:
        title: of the page.
        where: what was judged, in words: `best (step 500), 359 samples of val`.
        judged: the same for programs: the run and its checkpoint, or two folders.
        changed: what was set for this evaluation, as `KEY=VALUE`.
        metrics: by name, without `eval/`.
        skipped: left out, with the reason.
        notes: what the numbers rest on.
        parts: figures and tables.
        data: what a program gets beyond the metrics.
        texts: further files of the report, by name.
    """

    title: str
    where: str
    judged: dict[str, Any]
    changed: tuple[str, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


def measure(
    metrics: Mapping[str, Metric[Outputs]], wanted: Iterable[str], outputs: Outputs
) -> tuple[dict[str, float], list[Skipped]]:
    """Compute some metrics; one whose library is missing is skipped by name.

    >>> table = {"count": Metric(len), "other": Metric(len, "no_such_library", "pip install it")}
    >>> values, skipped = measure(table, ["count", "other"], [1.0, 2.0])
    >>> values, str(skipped[0])
    ({'count': 2}, 'other is skipped: no_such_library is not installed; pip install it')
    """
    values: dict[str, float] = {}
    skipped = []
    for name in wanted:
        metric = metrics[name]
        if metric.is_there:
            values[name] = metric.compute(outputs)
        else:
            skipped.append(Skipped(name, f"{metric.library} is not installed", metric.command))
    return values, skipped


def evaluation_report(evaluation: Evaluation) -> Report:
    """The page, the pictures and `evaluation.json`."""
    shown = list(evaluation.metrics.items())[:MAX_FACTS]
    facts = tuple(Fact(metric_value(name, value), metric_title(name)) for name, value in shown)
    report = Report(f"{evaluation.title}, evaluated", evaluation.where, facts, name="evaluation")
    changed = [Code("\n".join(f"--set {change}" for change in evaluation.changed))] if evaluation.changed else []
    said = [*evaluation.notes, *map(str, evaluation.skipped)]
    report.section("Metrics", [metric_table(evaluation), *changed, *said])
    report.section("In detail", evaluation.parts)
    report.data, report.texts = evaluation_data(evaluation), dict(evaluation.texts)
    return report


def metric_table(evaluation: Evaluation) -> Table:
    """The metrics, in percent where they are shares."""
    rows = tuple(
        (metric_title(name, unit=True), Spread(value * scale(name), None, number_format(name, [value])))
        for name, value in evaluation.metrics.items()
    )
    return Table("metrics", "", ("metric", "value"), rows)


def evaluation_data(evaluation: Evaluation) -> dict[str, Any]:
    """The evaluation for programs: `evaluation.json`."""
    return {
        "schema": 1, "ortho": __version__, **evaluation.judged, "changed": list(evaluation.changed),
        "metrics": evaluation.metrics, "skipped": [vars(skipped) for skipped in evaluation.skipped],
        "notes": evaluation.notes, **evaluation.data,
    }  # fmt: skip
