"""What is seen of a run on stderr: in a terminal a live view, elsewhere (a log file, a cluster) now and then a line."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

__all__ = ["LineView", "LiveView", "live_view"]

LINE_EVERY = 30.0  # seconds between two lines, but for evaluations, which all are told
STOPPING = "stopping: the state of this step is being saved (again, to quit without saving)"


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

    def stopping(self) -> None:
        """Say that the request was heard."""
        self._progress.update(self._task, speed=STOPPING)

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


class LineView:
    """Lines of text that follow the loop's reports: every evaluation, and training at most twice a minute."""

    def __init__(self, title: str) -> None:
        from rich.console import Console

        self._console, self._title = Console(stderr=True), title
        self._steps = self._first = 0
        self._train: dict[str, float] = {}
        self._last = self._began = time.monotonic()

    def total(self, steps: int, done: int) -> None:
        """The number of steps, and how many an earlier run did."""
        self._steps, self._first = steps, done
        self._began = time.monotonic()

    def metrics(self, counters: Any, values: dict[str, float]) -> None:
        """Print what is due."""
        judged = {name: value for name, value in values.items() if name.startswith("eval/")}
        self._train |= {name: value for name, value in values.items() if name == "train/loss"}
        if not judged and time.monotonic() - self._last < LINE_EVERY:
            return
        self._last = time.monotonic()
        facts = {name.replace("/", " ").replace("_", " "): value for name, value in (self._train | judged).items()}
        found = "".join(f"  {name} {value:.4g}" for name, value in facts.items())
        place = f"step {counters.step:,} of {self._steps:,}, epoch {counters.epoch}"
        self._say(place + found + self._left(counters.step))

    def timing(self, counters: Any, values: dict[str, float]) -> None:
        """Nothing: the time left is told from the whole run's speed."""

    def stopping(self) -> None:
        """Say that the request was heard."""
        self._say(STOPPING)

    def _say(self, text: str) -> None:
        self._console.print(f"{self._title}: {text}", markup=False, highlight=False, soft_wrap=True)

    def _left(self, step: int) -> str:
        seconds = (time.monotonic() - self._began) / max(1, step - self._first) * (self._steps - step)
        return f"  {timedelta(seconds=round(seconds))} left" if step < self._steps else ""


@contextmanager
def live_view(title: str, *, hidden: bool = False) -> Iterator[LiveView | LineView | None]:
    """A view of the run while the block runs; None where nobody wants it."""
    if hidden:
        yield None
        return
    if not sys.stderr.isatty():
        yield LineView(title)
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
        TextColumn("{task.fields[speed]}", markup=False), TimeElapsedColumn(), TextColumn("elapsed"),
        TimeRemainingColumn(), TextColumn("left"), console=Console(stderr=True),
    )  # fmt: skip
    with Live(progress, console=progress.console, transient=True) as live:
        yield LiveView(progress, title, live)
