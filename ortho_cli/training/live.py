"""The live view of a run: loss, learning rate, speed, time left, and what the methods say. On stderr, in a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["LiveView", "live_view"]


class LiveView:
    """A progress bar, and below it the latest numbers, that follow the loop's reports."""

    def __init__(self, progress: Any, title: str, live: Any) -> None:
        self._progress, self._live = progress, live
        self._task = progress.add_task(title, total=None, speed="")
        self._facts: dict[str, float] = {}

    def total(self, steps: int, done: int) -> None:
        """The number of steps, and how many an earlier run did."""
        self._progress.update(self._task, total=steps, completed=done)

    def metrics(self, counters: Any, values: dict[str, float]) -> None:
        """Show new numbers."""
        self._facts |= values
        self._progress.update(self._task, completed=counters.step)
        self._live.update(self._picture())

    def timing(self, counters: Any, values: dict[str, float]) -> None:
        """Show the speed."""
        self._progress.update(self._task, speed=f"{values['steps_per_second']:.3g} steps/s")

    def _picture(self) -> Any:
        """The bar, and a line for each kind of number: train, eval, every method."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        lines: dict[str, list[str]] = {}
        for name, value in self._facts.items():
            kind, _, rest = name.removeprefix("method/").partition("/")
            lines.setdefault(kind, []).append(f"{rest.replace('_', ' ')} {value:.4g}")
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        for kind, facts in lines.items():
            grid.add_row(kind, Text("   ".join(facts)))
        return Group(self._progress, grid)


@contextmanager
def live_view(title: str, *, hidden: bool = False) -> Iterator[LiveView | None]:
    """A live view while the block runs; None where nobody would see it."""
    if hidden or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.live import Live
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    progress = Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}", markup=False), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(), console=Console(stderr=True),
    )  # fmt: skip
    with Live(progress, console=progress.console, transient=True) as live:
        yield LiveView(progress, title, live)
