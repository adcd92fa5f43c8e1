"""Runs that differ by their seed alone are one group; groups are named by what their recipes differ in."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ortho_cli.errors import UsageError
from ortho_cli.recipe.matrix import short_keys
from ortho_cli.recipe.train import MAY_CHANGE

from .metric_names import better
from .recipe_text import ABSENT, flat_recipe, public_text
from .run_folder import Run, Series

__all__ = ["Group", "Summary", "differing_keys", "group_runs", "value_text"]

SEED = "train.seed"
# What makes no other experiment: the seed, and what a run may be resumed with.
ALIKE = frozenset({SEED, "matrix", "version", *MAY_CHANGE})
PLAIN = "plain"  # how a recipe without methods is called
TRACKERS = frozenset({"track_conditioning", "track_stability"})  # which change nothing, and so name nothing
MAX_LABEL = 40  # a longer one is no name


@dataclass(frozen=True)
class Summary:
    """Single values of some runs, their mean, and their sample standard deviation (None of one)."""

    values: tuple[float, ...]
    mean: float
    sd: float | None

    @classmethod
    def of(cls, values: Iterable[float]) -> Summary:
        """Summarise at least one value; one that is not finite makes mean and deviation nan.

        >>> Summary.of([1.0, 3.0]).mean, Summary.of([1.0]).sd is None
        (2.0, True)
        """
        found = tuple(values)
        if not all(map(math.isfinite, found)):
            return cls(found, math.nan, math.nan if len(found) > 1 else None)
        return cls(found, statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None)


@dataclass(frozen=True)
class Group:
    """Runs of one recipe.

    Attributes:
        label: short; no other group has it.
        runs: in the order given.
        values: what the recipes hold at the keys in which groups differ.
    """

    label: str
    runs: tuple[Run, ...]
    values: dict[str, object]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The runs' seeds."""
        return tuple(run.recipe.train.seed for run in self.runs)

    @property
    def trained(self) -> int | None:
        """How many parameters trained; None where no run is finished, or runs differ."""
        counts = {int(run.outcome["trainable"]) for run in self.runs if run.is_finished}
        return counts.pop() if len(counts) == 1 else None

    def series(self, metric: str) -> list[Series]:
        """The metric in each run that has it."""
        return [run.metrics[metric] for run in self.runs if metric in run.metrics]

    def final(self, metric: str) -> Summary | None:
        """The last values; None where no run has the metric."""
        found = self.series(metric)
        return Summary.of(series.final for series in found) if found else None

    def best(self, metric: str) -> Summary | None:
        """Each run's best value, then the mean over runs."""
        found = self.series(metric)
        return Summary.of(series.best(better(metric))[1] for series in found) if found else None

    def curve(self, metric: str) -> list[tuple[int, Summary]]:
        """The metric over the steps; at each step of the runs that measured it then."""
        by_step: dict[int, list[float]] = {}
        for series in self.series(metric):
            for step, value in zip(series.steps, series.values, strict=True):
                by_step.setdefault(step, []).append(value)
        return [(step, Summary.of(by_step[step])) for step in sorted(by_step)]


def group_runs(runs: Sequence[Run], by: Sequence[str] = ()) -> list[Group]:
    """Put runs together whose recipes are equal but for the seed, the folder, and what a run may be resumed with.

    Args:
        runs: at least one.
        by: dotted keys; runs are put together by these alone.

    Raises:
        UsageError: a key that no run has; the hint gives the nearest.
    """
    recipes = [flat_recipe(run.recipe) for run in runs]
    _check_keys(by, recipes)
    keys = list(by) or differing_keys(recipes)
    together: dict[str, list[int]] = {}
    for index, recipe in enumerate(recipes):
        chosen = {key: recipe.get(key, ABSENT) for key in keys} if by else _compared(recipe)
        together.setdefault(json.dumps(chosen, sort_keys=True, default=str), []).append(index)
    members = list(together.values())
    rows = [{key: recipes[indices[0]].get(key, ABSENT) for key in keys} for indices in members]
    labels = _labels(rows, [[runs[index] for index in indices] for indices in members])
    return [
        Group(label, tuple(runs[index] for index in indices), row)
        for label, indices, row in zip(labels, members, rows, strict=True)
    ]


def differing_keys(recipes: Sequence[dict[str, object]]) -> list[str]:
    """The keys at which recipes that have them hold different values, in the recipes' order.

    What a method has that another recipe's methods lack is no difference beside `methods` itself.
    """
    order = list(dict.fromkeys(key for recipe in recipes for key in _compared(recipe)))
    return [key for key in order if len({_canonical(recipe[key]) for recipe in recipes if key in recipe}) > 1]


def _compared(recipe: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in recipe.items() if key not in ALIKE}


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _check_keys(keys: Iterable[str], recipes: Sequence[dict[str, object]]) -> None:
    known = list(dict.fromkeys(key for recipe in recipes for key in recipe))
    for key in keys:
        if key not in known:
            endings = [name for name in known if name.endswith(f".{key}")]
            near = endings or difflib.get_close_matches(key, known, 3)
            hint = f"did you mean {' or '.join(near)}?" if near else "a key of recipe.yaml, e.g. methods.hra.penalty"
            raise UsageError(f"--group-by {key}: no run's recipe has this key", hint=hint)


def _labels(rows: Sequence[dict[str, object]], members: Sequence[Sequence[Run]]) -> list[str]:
    """A name for each group: what it differs in, or where that is long or nothing the folder of its runs."""
    labels = [_label(row) for row in rows]
    if len(set(labels)) < len(labels) or not all(labels):
        labels = [", ".join(f"{key}={value_text(value)}" for key, value in _shortly(row).items()) for row in rows]
    folders = [_folder(runs) or runs[0].name for runs in members]
    if max(map(len, labels)) > MAX_LABEL or not all(labels):
        labels = folders if len(set(folders)) == len(folders) else labels
    return [
        label if labels.count(label) == 1 else f"{label} ({labels[:index].count(label) + 1})"
        for index, label in enumerate(labels)
    ]


def _label(row: dict[str, object]) -> str:
    """`hra, penalty=1e-5, gram_schmidt`: names and switches speak for themselves; what is off says nothing."""
    names = [_treatment(str(value)) for key, value in row.items() if _is_name(key)]
    rest = {key: value for key, value in row.items() if not _is_name(key) and value is not False and value is not None}
    return ", ".join([*names, *(key if value is True else f"{key}={value_text(value)}"
                                for key, value in _shortly(rest).items())])  # fmt: skip


def _treatment(names: str) -> str:
    """What is done to a model: its methods but those that only watch."""
    kept = [name for name in names.split(", ") if name not in TRACKERS]
    return PLAIN if kept in ([], ["none"]) else ", ".join(kept)


def _shortly(row: dict[str, object]) -> dict[str, object]:
    """What a recipe has at some keys, by the ends of these that tell them apart."""
    present = [key for key, value in row.items() if value != ABSENT]
    return {short: row[key] for key, short in short_keys(present).items()}


def _is_name(key: str) -> bool:
    return key == "methods" or key.endswith(".name")


def _folder(runs: Sequence[Run]) -> str:
    """The runs' folder: the matrix's of its cells, else what their names begin with."""
    parents = {run.folder.resolve().parent for run in runs}
    if all("=" in run.name for run in runs) and len(parents) == 1:
        return parents.pop().name
    names = [run.name for run in runs]
    shared = os.path.commonprefix(names)  # noqa: RUF071 - of characters, that is: these are no paths
    return shared.rstrip("-_=., ") if len(set(names)) > 1 else names[0]


def value_text(value: object) -> str:
    """A recipe's value in few characters.

    >>> [value_text(value) for value in (1e-5, 0.0, 0.01, True, None, ["crop", "flip"], "/data/cifar")]
    ['1e-5', '0', '0.01', 'true', 'null', '[crop, flip]', 'cifar']
    """
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, float):
        return re.sub(r"e([-+])0+(?=\d)", r"e\1", f"{value:g}").replace("e+", "e")
    if isinstance(value, list):
        return f"[{', '.join(map(value_text, value))}]"
    return public_text(str(value))
