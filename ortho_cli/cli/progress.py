"""Progress bars for bytes and for items, on stderr and only where that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

__all__ = ["Bar", "byte_bar", "item_bar", "status_line"]


class Bar:
    """What `surgery.plan.run` and makers report to."""

    def __init__(self, bar: RichProgress, title: str) -> None:
        self._bar = bar
        self._title = title
        self._task: TaskID | None = None

    def start(self, total: int) -> None:
        """Show the bar."""
        self._task = self._bar.add_task(self._title, total=total)

    def advance(self, count: int) -> None:
        """Move it."""
        if self._task is not None:
            self._bar.advance(self._task, count)


def byte_bar(title: str, *, hidden: bool = False) -> AbstractContextManager[Bar | None]:
    """A bar of bytes while the block runs; None where nobody would see it."""
    return _bar(title, True, hidden)


def item_bar(title: str, *, hidden: bool = False) -> AbstractContextManager[Bar | None]:
    """A bar of items while the block runs; None where nobody would see it."""
    return _bar(title, False, hidden)


@contextmanager
def _bar(title: str, of_bytes: bool, hidden: bool) -> Iterator[Bar | None]:
    if hidden or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    counts = (DownloadColumn(), TransferSpeedColumn()) if of_bytes else (MofNCompleteColumn(),)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), *counts, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield Bar(bar, title)


@contextmanager
def status_line(*, hidden: bool = False) -> Iterator[Callable[[str], None]]:
    """A function that shows a line on stderr in place of the one before, while the block runs."""
    if hidden or not sys.stderr.isatty():
        yield lambda line: None
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status("") as status:
        yield lambda line: status.update(Text(line))
