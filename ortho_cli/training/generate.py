"""What `ortho generate` makes things with: a run or a base, and the maker for its task.

A maker is one file and one line in the registry's `makers`; the command line knows none of them. It hands over the
options that were typed, and those that a task's maker does not take are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ortho_cli import registry
from ortho_cli.analysis.run_folder import is_run, open_run
from ortho_cli.errors import UsageError
from ortho_cli.recipe.train import load_train

from .base import gone_base
from .run_folder import RECIPE

__all__ = ["Made", "Maker", "Making", "Progress", "Source", "open_making"]

BASE_TASK = "control"  # whose maker takes weights that no run trained: a base may hold a hint encoder


@dataclass(frozen=True)
class Source:
    """What things are made with: `place` is the folder of a run, with its recipe, or, without, any weights."""

    place: str
    recipe: Any = None

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(self.place)


@dataclass
class Made:
    """What came of it: names of files within the output folder, and what a report says."""

    made: list[str]
    skipped: list[str]
    checkpoint: str | None = None
    also: list[str] = field(default_factory=list)
    """Files beside those that were asked for: manifests, contact sheets."""
    notes: list[str] = field(default_factory=list)


class Progress(Protocol):
    """Who is told how far it is."""

    def start(self, total: int) -> None:
        """So many files are missing."""

    def advance(self, count: int) -> None:
        """So many more are there."""


class Making(Protocol):
    """One command's worth of things to make, its options checked; nothing is read yet but the recipe."""

    def planned(self) -> dict[str, Any]:
        """What a dry run tells: `kind`, `files`, and what else there is to know; no weights are read."""

    def make(self, output: Path, progress: Progress | None) -> Made:
        """Fill the folder; what is there already is kept, what was made otherwise is an OutputError."""


@dataclass(frozen=True)
class Maker:
    """A task's way of making things.

    Attributes:
        options: keys of the options that it takes: their long names, `_` for `-`.
        open: from the source and the options that were typed to what is to be made; raises UsageError.
    """

    options: frozenset[str]
    open: Callable[[Source, Mapping[str, Any]], Making]


def open_making(place: str, asked: Mapping[str, Any]) -> Making:
    """The things that a command asks for, by the maker of the run's task.

    Args:
        place: a run's folder, or the weights of a base.
        asked: the options that were typed, by key.

    Raises:
        UsageError: the task has nothing to make, or its maker lacks an option.
        CheckpointError: a folder that is neither a run nor weights.
    """
    source = _source(place)
    task = BASE_TASK if source.recipe is None else source.recipe.task.name
    kind = f"run {source.folder.name} is of the task {task}" if source.recipe is not None else f"{place} is a base"
    if task not in registry.TABLES["makers"]:
        known = ", ".join(registry.names("makers"))
        raise UsageError(
            f"{kind}, which has no generator",
            hint=f"ortho generate takes runs of {known}, e.g. of: ortho train digits-eigengan",
        )
    maker: Maker = registry.resolve("makers", task)
    for key in asked:
        if key not in maker.options:
            taken = ", ".join(_flag(option) for option in sorted(maker.options))
            raise UsageError(f"{kind}, for which there is no {_flag(key)}", hint=f"leave it out; there are {taken}")
    return maker.open(source, asked)


def _source(place: str) -> Source:
    folder = Path(place).expanduser()
    if is_run(folder):
        return Source(str(folder), load_train(folder / RECIPE))
    if gone_base(place) or (folder.is_dir() and not (folder / "model_index.json").is_file()):
        open_run(folder)  # says what is missing of a run
    return Source(place)


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"
