"""Time several ways to do one thing in the same run, in shuffled rounds, so that what disturbs one disturbs all."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ortho_cli.errors import UsageError

__all__ = ["Timing", "check_device", "kept_bytes", "peak_bytes", "shuffled_rounds", "threads_of"]

# A median of fewer says little; what is many times slower than the rest needs no fine one.
LEAST_ROUNDS, SLOW_ROUNDS = 5, 3


@dataclass
class Timing:
    """Seconds of every round of one form."""

    name: str
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median seconds of a round."""
        return statistics.median(self.seconds)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "name": self.name,
            "median_seconds": self.median,
            "fastest_seconds": min(self.seconds),
            "seconds": self.seconds,
        }


def shuffled_rounds(
    forms: Mapping[str, Callable[[], object]],
    rounds: int,
    device: str,
    *,
    limit: float | None = None,
    slow: Collection[str] = (),
) -> dict[str, Timing]:
    """Run every form once a round, each round in another order.

    Args:
        forms: what to time, by name; warm.
        rounds: how often.
        device: waited for before the clock is read.
        limit: seconds after which no further round starts, once there were `LEAST_ROUNDS`.
        slow: forms that take part in the first `SLOW_ROUNDS` only.

    Returns:
        A timing of each form, in the order of `forms`.

    >>> timings = shuffled_rounds({"a": lambda: None, "b": lambda: None}, 3, "cpu")
    >>> [len(timing.seconds) for timing in timings.values()]
    [3, 3]
    """
    timings = {name: Timing(name) for name in forms}
    order = random.Random(0)
    begin = time.perf_counter()
    for done in range(rounds):
        if limit is not None and done >= LEAST_ROUNDS and time.perf_counter() - begin > limit:
            break
        taking_part = [name for name in forms if done < SLOW_ROUNDS or name not in slow]
        for name in order.sample(taking_part, len(taking_part)):
            start = time.perf_counter()
            forms[name]()
            if device != "cpu":
                torch.accelerator.synchronize()
            timings[name].seconds.append(time.perf_counter() - start)
    return timings


def kept_bytes(forward: Callable[[], object], weights: Iterable[Tensor]) -> int:
    """Bytes that a forward pass keeps for backward, each memory once, without what is there anyway.

    Args:
        forward: gives what has the graph; dropped at once.
        weights: parameters, which are not counted.

    >>> x = torch.ones(4, requires_grad=True)
    >>> kept_bytes(lambda: x.exp(), [x])
    16
    """
    own = {tensor.untyped_storage()._cdata for tensor in weights}
    kept: dict[int, Tensor] = {}  # the tensors too: a storage that is let go may be another's next

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del output
    return found


def peak_bytes(run: Callable[[], object], device: str) -> int | None:
    """The most memory that a run takes beyond what was there before; None on a CPU, which does not say."""
    if device == "cpu":
        return None
    torch.accelerator.synchronize()
    before = torch.accelerator.memory_allocated()
    torch.accelerator.reset_peak_memory_stats()
    run()
    torch.accelerator.synchronize()
    return int(torch.accelerator.max_memory_allocated() - before)


@contextmanager
def threads_of(count: int | None) -> Iterator[None]:
    """Give torch this many CPU threads inside the block; None leaves its number."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_device(device: str) -> None:
    """Refuse a device that is not here.

    Raises:
        UsageError: it is not.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = "unknown"
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind != "cpu" and (found is None or found.type != kind):
        here = f"cpu and {found.type}" if found is not None else "only cpu"
        raise UsageError(f"device {device!r} is not here", hint=f"there is {here}")
