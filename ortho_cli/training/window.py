"""What the steps since the last line of the log said: kept on the device, so that no step waits for another."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ortho_cli.errors import NumericsError

__all__ = ["Window", "check_number"]

CHECK_EVERY = 10  # steps between looks at losses that lie on another device, or with other processes
LOSSES = ("loss", "penalty")  # ends of names; other numbers may be infinite: a gradient's norm where fp16 skips a step


class Window:
    """Scalars by name, each with its step.

    Args:
        accelerator: means are over its processes.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        here = accelerator.device.type == "cpu" and accelerator.num_processes == 1
        self.check_every = 1 if here else CHECK_EVERY
        self._series: dict[str, list[tuple[int, Tensor]]] = {}
        self._unchecked: list[tuple[str, int, Tensor]] = []
        self._steps = 0
        self._started = time.perf_counter()

    def add(self, step: int, values: dict[str, Tensor]) -> None:
        """Take in what one step said."""
        for name, value in values.items():
            self._series.setdefault(name, []).append((step, value))
            if name.endswith(LOSSES):
                self._unchecked.append((name, step, value))
        self._steps += 1

    def check(self) -> None:
        """Look at the losses that nobody has looked at yet.

        Raises:
            NumericsError: one is not finite; it names the first step.
        """
        numbers = self._means([value for _, _, value in self._unchecked])
        for (name, step, _), number in zip(self._unchecked, numbers, strict=True):
            check_number(name, number, step)
        self._unchecked.clear()

    def means(self) -> dict[str, float]:
        """The mean of each scalar, over steps and processes; the window is empty after it.

        Raises:
            NumericsError: as `check`.
        """
        self.check()
        numbers = iter(self._means([value for entries in self._series.values() for _, value in entries]))
        found = {
            name: math.fsum(next(numbers) for _ in entries) / len(entries) for name, entries in self._series.items()
        }
        self._series.clear()
        return found

    def _means(self, values: list[Tensor]) -> list[float]:
        """Values over all processes, by one transfer."""
        if not values:
            return []
        stacked = torch.stack([value.float() for value in values])
        if self.accelerator.num_processes > 1:
            stacked = self.accelerator.reduce(stacked, "mean")
        numbers: list[float] = stacked.tolist()
        return numbers

    def steps_per_second(self) -> float:
        """The speed since it was last asked for."""
        now = time.perf_counter()
        speed = self._steps / max(now - self._started, 1e-9)
        self._started, self._steps = now, 0
        return speed

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What the block takes is no part of a step's time."""
        began = time.perf_counter()
        yield
        self._started += time.perf_counter() - began

    def state(self) -> dict[str, Any]:
        """All of it as JSON, which float32 survives bit for bit; means over processes, so that each can go on."""
        numbers = iter(self._means([value for entries in self._series.values() for _, value in entries]))
        return {name: [[step, next(numbers)] for step, _ in entries] for name, entries in self._series.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        device = self.accelerator.device
        self._series = {
            name: [(step, torch.tensor(value, device=device)) for step, value in entries]
            for name, entries in state.items()
        }


def check_number(name: str, value: float, step: int) -> None:
    """Refuse a loss that is not finite.

    Raises:
        NumericsError: with its step.

    >>> check_number("train/gradient_norm", float("inf"), 3)
    >>> check_number("train/loss", float("nan"), 3)
    Traceback (most recent call last):
    ortho_cli.errors.NumericsError: train/loss is nan at step 3
    """
    if name.endswith(LOSSES) and not math.isfinite(value):
        raise NumericsError(f"{name} is {value} at step {step}")
