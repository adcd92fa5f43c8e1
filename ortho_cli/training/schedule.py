"""Learning-rate schedules as pure functions of the step: no state to save, so a resumed run is where it was.

A schedule gives the factor on the optimizer's learning rate at a step in ``[0, total)``; warm-up rises linearly to the
schedule's own start over its first steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

__all__ = [
    "Schedule", "build_schedule", "constant", "cosine", "inverse_sqrt", "linear", "multistep", "one_cycle",
    "with_warmup",
]  # fmt: skip

Schedule = Callable[[int], float]
ONE_CYCLE_RISE = 0.3  # share of the run spent rising (Smith & Topin, arXiv 1708.07120, as fastai uses it)
ONE_CYCLE_START = 1 / 25
ONE_CYCLE_END = 1e-4 / 25


def build_schedule(config: Any, total: int, steps_per_epoch: int) -> Schedule:
    """The schedule of a recipe's `schedule` section; its epochs become steps."""
    warmup = config.warmup or round((config.warmup_ratio or 0.0) * total)
    made = {
        "constant": lambda: constant(),
        "linear": lambda: linear(total, warmup, config.hold),
        "cosine": lambda: cosine(total, warmup, config.floor, config.k_decay),
        "multistep": lambda: multistep([mark * steps_per_epoch for mark in config.at], config.factor),
        "inverse-sqrt": lambda: inverse_sqrt(warmup + config.hold),
        "one-cycle": lambda: one_cycle(total),
    }[config.name]()
    return with_warmup(made, warmup)


def with_warmup(schedule: Schedule, warmup: int) -> Schedule:
    """Rise linearly from ``1 / warmup`` of the schedule over the first `warmup` steps.

    >>> [round(with_warmup(constant(), 4)(step), 2) for step in range(6)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    """
    if warmup <= 0:
        return schedule
    return lambda step: schedule(step) * min(1.0, (step + 1) / warmup)


def constant() -> Schedule:
    """Always 1."""
    return lambda step: 1.0


def linear(total: int, warmup: int = 0, hold: float = 0.0) -> Schedule:
    """From 1 at the end of warm-up, or after `hold` of the run, to 0 at `total`; 1 to the end where that lasts as long.

    >>> [linear(4, 2)(step) for step in range(5)], linear(2, 3)(1)
    ([1.0, 1.0, 1.0, 0.5, 0.0], 1.0)
    >>> [linear(4, hold=0.5)(step) for step in range(5)]
    [1.0, 1.0, 1.0, 0.5, 0.0]
    """
    start = max(warmup, round(hold * total))
    return lambda step: 1.0 if step < start else max(0.0, (total - step) / max(1, total - start))


def cosine(total: int, warmup: int = 0, floor: float = 0.0, k_decay: float = 1.0) -> Schedule:
    """Half a cosine from 1 at the end of warm-up to `floor` at `total` (arXiv 1608.03983, without restarts).

    The share done is raised to `k_decay` (arXiv 2004.05909): below 1 most of the fall comes early.

    >>> round(cosine(100)(50), 3), round(cosine(100, floor=0.1)(100), 3)
    (0.5, 0.1)
    """

    def factor(step: int) -> float:
        done = min(1.0, max(0, step - warmup) / max(1, total - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done**k_decay))

    return factor


def multistep(at: Sequence[int], factor: float) -> Schedule:
    """Multiply by `factor` at each of the steps `at`.

    >>> [multistep([2, 4], 0.1)(step) for step in (1, 2, 5)]
    [1.0, 0.1, 0.010000000000000002]
    """
    return lambda step: float(factor ** sum(step >= mark for mark in at))


def inverse_sqrt(start: int) -> Schedule:
    """1 for `start` steps, then ``sqrt(start / step)`` (arXiv 1706.03762); from the first on ``1 / sqrt(step + 1)``.

    >>> [round(inverse_sqrt(4)(step), 3) for step in (0, 3, 15)]
    [1.0, 1.0, 0.5]
    """
    start = max(1, start)
    return lambda step: math.sqrt(start / max(start, step + 1))


def one_cycle(total: int) -> Schedule:
    """Cosine up from 1/25 over 30 % of the run, then cosine down to 4e-6."""
    peak = max(1, round(total * ONE_CYCLE_RISE))

    def factor(step: int) -> float:
        if step < peak:
            return _cosine_between(ONE_CYCLE_START, 1.0, step / peak)
        return _cosine_between(1.0, ONE_CYCLE_END, (step - peak) / max(1, total - peak))

    return factor


def _cosine_between(start: float, end: float, done: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
