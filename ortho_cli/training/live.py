"""The live view of a run: loss, learning rate, speed, time left, and what the methods say. On stderr, in a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["LiveView", "observer"]


class LiveView:
    """One progress line that follows the loop's reports."""

    def __init__(self, progress: Any, title: str) -> None:
        self._progress = progress
        self._task = progress.add_task(title, total=None, facts="")
        self._facts: dict[str, str] = {}

    def metrics(self, counters: Any, values: dict[str, float]) -> None:
        """Show new numbers."""
        for name, value in values.items():
            if name in ("train/loss", "train/lr") or name.startswith(("eval/", "method/")):
                self._facts[name.partition("/")[2]] = f"{value:.4g}"
        facts = "  ".join(f"{name} {value}" for name, value in list(self._facts.items())[:6])
        self._progress.update(self._task, completed=counters.step, facts=facts)

    def timing(self, counters: Any, values: dict[str, float]) -> None:
        """Show the speed."""
        self._facts["steps/s"] = f"{values['steps_per_second']:.1f}"

    def total(self, steps: int) -> None:
        """The number of steps, once it is known."""
        self._progress.update(self._task, total=steps)


@contextmanager
def observer(recipe: Any, *, quiet: bool = False, title: str = "train") -> Iterator[LiveView | None]:
    """A live view while the block runs, where somebody can see it."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[facts]}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield LiveView(progress, title)
