"""A progress bar for bytes, on stderr and only where that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

__all__ = ["ByteBar", "byte_bar"]


class ByteBar:
    """What `surgery.plan.run` reports to."""

    def __init__(self, bar: RichProgress, title: str) -> None:
        self._bar = bar
        self._title = title
        self._task: TaskID | None = None

    def start(self, total_bytes: int) -> None:
        """Show the bar."""
        self._task = self._bar.add_task(self._title, total=total_bytes)

    def advance(self, count: int) -> None:
        """Move it."""
        if self._task is not None:
            self._bar.advance(self._task, count)


@contextmanager
def byte_bar(title: str, *, hidden: bool = False) -> Iterator[ByteBar | None]:
    """A bar while the block runs; None where nobody would see it."""
    if hidden or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield ByteBar(bar, title)
