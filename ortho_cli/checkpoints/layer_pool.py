"""Work on many layers at once, ahead of whoever takes the results one after the other.

Each job runs on one thread of its own, so that sums are formed in one order: the number of workers changes when a
result is there, never what it is. What runs or waits to be taken stays within a budget of memory.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

__all__ = ["MEMORY_BYTES", "LayerPool", "default_workers"]

# What all jobs under way may hold together; with the interpreter and torch a process stays below 1 GB.
MEMORY_BYTES = 600 * 2**20
LARGE_BYTES = 32 * 2**20
Result = TypeVar("Result")


def default_workers() -> int:
    """The processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class LayerPool(Generic[Result]):
    """Results by key, computed ahead in the order in which they will be taken.

    Args:
        compute: key -> result; called in worker threads.
        takes: how often each result is taken before it is let go.
        workers: jobs at a time; one that needs more than `MEMORY_BYTES` runs alone.

    >>> pool = LayerPool(len, workers=2)
    >>> list(pool.map({"a": 8, "bb": 8}))
    [1, 2]
    """

    def __init__(self, compute: Callable[[str], Result], *, takes: int = 1, workers: int = 1) -> None:
        self._compute = compute
        self._takes = takes
        self._workers = workers
        self._costs: dict[str, int] = {}
        self._waiting: list[str] = []
        self._left: dict[str, int] = {}
        self._futures: dict[str, Future[Result]] = {}
        self._executor: ThreadPoolExecutor | None = None

    @property
    def needed(self) -> int:
        """Bytes that the jobs under way may need together."""
        largest = sorted(self._costs.values(), reverse=True)[: self._workers]
        return min(sum(largest), max(MEMORY_BYTES, *largest[:1], 0))

    def schedule(self, costs: Mapping[str, int]) -> None:
        """Set what will be taken: every key, in the order of taking -> bytes its job needs."""
        self._costs, self._waiting = dict(costs), list(reversed(list(costs)))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let the jobs run while the block does; what has not begun by its end is dropped."""
        import torch

        before = torch.get_num_threads()
        with ThreadPoolExecutor(self._workers, "layer", torch.set_num_threads, (1,)) as executor:
            self._executor = executor
            try:
                yield
            finally:
                executor.shutdown(wait=True, cancel_futures=True)
                self._executor = None
                self._futures.clear()
                torch.set_num_threads(before)

    def take(self, key: str) -> Result:
        """Wait for a result; whatever its job raised is raised here."""
        if key not in self._futures:
            self._submit(key)
        self._fill()
        result = self._futures[key].result()
        self._left[key] -= 1
        if not self._left[key]:
            del self._futures[key], self._left[key]
        return result

    def map(self, costs: Mapping[str, int]) -> Iterator[Result]:
        """All results, in order, with what `schedule` wants to know."""
        self.schedule(costs)
        with self.running():
            for key in costs:
                yield self.take(key)

    def _submit(self, key: str) -> None:
        assert self._executor is not None, "take() outside running()"
        if key in self._waiting:
            self._waiting.remove(key)
        self._futures[key] = self._executor.submit(self._run, key)
        self._left[key] = self._takes

    def _run(self, key: str) -> Result:
        result = self._compute(key)
        if self._costs.get(key, 0) > LARGE_BYTES:
            _give_back()
        return result

    def _fill(self) -> None:
        """Start jobs ahead, as many as workers and memory allow."""
        while self._waiting and len(self._futures) <= self._workers:
            following = self._waiting[-1]
            held = sum(self._costs.get(key, 0) for key in self._futures)
            if self._futures and held + self._costs[following] > MEMORY_BYTES:
                return
            self._submit(following)


def _give_back() -> None:
    """Give freed memory back to the system: glibc keeps what each thread has freed, hundreds of megabytes of it."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
