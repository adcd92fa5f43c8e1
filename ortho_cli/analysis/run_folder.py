"""What `ortho train` leaves in a run's folder, read back; and the runs that folders hold.

recipe.yaml     the resolved recipe
metrics.jsonl   a line of numbers each time something was measured
timing.jsonl    what differs from machine to machine: speed, memory
outcome.json    what it ended with; missing while a run is not finished
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ortho_cli.checkpoints.store import read_json
from ortho_cli.errors import CheckpointError
from ortho_cli.recipe.train import TrainRecipe, load_train

__all__ = ["Run", "Series", "find_runs", "is_run", "open_run", "read_lines"]

COUNTERS = ("step", "epoch", "samples", "time")  # of a line; everything else in it was measured
PRUNED = {"checkpoints", "export", "figures", "items"}  # folders of a run, and no place for runs


@dataclass(frozen=True)
class Series:
    """A metric over the steps at which it was measured."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def final(self) -> float:
        """The last value."""
        return self.values[-1]

    def best(self, mode: str) -> tuple[int, float]:
        """The step and value of the smallest (`min`) or largest (`max`) value; the first of equals."""
        pick = min if mode == "min" else max
        found = [(value, step) for step, value in zip(self.steps, self.values, strict=True) if math.isfinite(value)]
        if not found:
            return self.steps[-1], math.nan
        value = pick(value for value, _ in found)
        return next(step for each, step in found if each == value), value


@dataclass(frozen=True)
class Run:
    """One run's folder, read.

    Attributes:
        folder: of the run.
        recipe: resolved.
        metrics: by name, as in `metrics.jsonl`.
        timing: by name, as in `timing.jsonl`.
        outcome: of a finished run; empty where it is not.
    """

    folder: Path
    recipe: TrainRecipe
    metrics: dict[str, Series]
    timing: dict[str, Series] = field(default_factory=dict)
    outcome: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The folder's own name, without the path that led to it."""
        return self.folder.resolve().name

    @property
    def title(self) -> str:
        """The name; of a matrix's cell, which says its keys alone, with the matrix's before it."""
        return f"{self.folder.resolve().parent.name}/{self.name}" if "=" in self.name else self.name

    @cached_property
    def step(self) -> int:
        """The last step that was logged."""
        return max((series.steps[-1] for series in self.metrics.values()), default=0)

    @property
    def is_finished(self) -> bool:
        """Whether it came to its end."""
        return bool(self.outcome)


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run."""
    return (folder / "recipe.yaml").is_file() and (folder / "metrics.jsonl").is_file()


def open_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises:
        CheckpointError: it is none, or a file of it is damaged.
        RecipeError: its recipe is not one of this version.
    """
    if not is_run(folder):
        cells = sum(map(is_run, folder.iterdir())) if folder.is_dir() else 0
        reason = f"it holds {cells} runs" if cells else "it holds no recipe.yaml with metrics.jsonl"
        raise CheckpointError(
            f"there is no folder {folder}" if not folder.exists() else f"{folder} is no run: {reason}",
            hint="name one of them; ortho analyze runs has all" if cells else "name a run.dir of: ortho train",
        )
    timing, outcome = folder / "timing.jsonl", folder / "outcome.json"
    return Run(
        folder,
        load_train(folder / "recipe.yaml"),
        _series(folder / "metrics.jsonl"),
        _series(timing) if timing.is_file() else {},
        read_json(outcome) if outcome.is_file() else {},
    )


def find_runs(places: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """The runs of some folders: each is one, or holds some, e.g. the cells of a matrix; in order, each once.

    Raises:
        CheckpointError: a place without a run.
    """
    found: dict[Path, Path] = {}
    for place in map(Path, places):
        below = list(_below(place)) if place.is_dir() else []
        if not below:
            reason = "there are no runs in" if place.is_dir() else "there is no folder"
            raise CheckpointError(f"{reason} {place}", hint="name a run.dir of: ortho train")
        for folder in below:
            found.setdefault(folder.resolve(), folder)
    return [open_run(folder) for folder in found.values()]


def _below(folder: Path) -> Iterator[Path]:
    for here, names, _ in os.walk(folder):
        names.sort()
        names[:] = [name for name in names if name not in PRUNED and not name.startswith(".")]
        if is_run(Path(here)):
            names.clear()
            yield Path(here)


def _series(path: Path) -> dict[str, Series]:
    """The numbers of a file of lines, by name; null, which stands for inf and nan, becomes nan."""
    steps: dict[str, list[int]] = {}
    values: dict[str, list[float]] = {}
    for line in read_lines(path):
        for name, value in line.items():
            if name not in COUNTERS and (value is None or isinstance(value, (int, float))):
                steps.setdefault(name, []).append(int(line["step"]))
                values.setdefault(name, []).append(math.nan if value is None else float(value))
    return {name: Series(tuple(steps[name]), tuple(values[name])) for name in values}


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines; an unfinished last line (a killed run) is passed over.

    Raises:
        CheckpointError: a line before the last is damaged.
    """
    lines = path.read_text("utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            yield json.loads(line)
        except ValueError as error:
            if number == len(lines):
                return
            raise CheckpointError(f"{path.name}:{number} is damaged", where=str(path)) from error
