"""Time the routes to the polar factor of a weight or a gradient, beside a float32 SVD, with the error of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import log10, sqrt
from typing import Any

import torch
from torch import Tensor

from ortho_cli.linalg.nog import nearest_orthogonal
from ortho_cli.linalg.polar import METHODS, polar_factor

from .side_by_side import Timing, check_device, shuffled_rounds, threads_of

__all__ = ["NOG", "PLAIN", "ROUTES", "PolarTiming", "measure_polar", "weight_of"]

PLAIN = "torch.linalg.svd, float32"


@dataclass
class PolarTiming(Timing):
    """Seconds of every round at a shape; `speedup` of medians over the plain form, `error` `||P - P64|| / ||P64||`."""

    shape: tuple[int, int] = (0, 0)
    speedup: float = 1.0
    error: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return super().as_dict() | {"shape": list(self.shape), "speedup": self.speedup, "error": self.error}


def _route(weight: Tensor, route: str) -> Tensor:
    return polar_factor(weight, method=route).factor


Forms = Mapping[str, Callable[[Tensor], Tensor]]
ROUTES: Forms = {route: partial(_route, route=route) for route in METHODS[1:]}
"""What `polar_factor` can do: the factor, with its error and how it was found."""
NOG: Forms = {"nearest_orthogonal": nearest_orthogonal}
"""What a gradient is replaced by in every step: the factor and nothing else."""


def measure_polar(
    shapes: Sequence[tuple[int, int]],
    *,
    forms: Forms = ROUTES,
    condition: float = 1e3,
    rounds: int = 5,
    threads: int = 1,
    device: str = "cpu",
) -> Iterator[PolarTiming]:
    """Time every form at every shape, in shuffled rounds; the plain one first.

    Args:
        shapes: of the weights.
        forms: `ROUTES` or `NOG`.
        condition: of the weights; their singular values fall evenly in decades.
        rounds: how often.
        threads: of the CPU; `ortho analyze stability` gives each layer one.
        device: where.

    Raises:
        UsageError: a device that is not here.
    """
    check_device(device)
    with threads_of(threads), torch.inference_mode():
        for shape in shapes:
            exact = weight_of(shape, condition)
            weight = exact.float().to(device)
            left, _, right = torch.linalg.svd(weight.double().cpu(), full_matrices=False)
            exact = left @ right
            calls = {name: partial(form, weight) for name, form in {PLAIN: _plain, **forms}.items()}
            made = {name: call().double().cpu() for name, call in calls.items()}  # warm
            timed = shuffled_rounds(calls, rounds, device)
            base = timed[PLAIN].median
            for name, timing in timed.items():
                error = float((made[name] - exact).norm()) / sqrt(min(shape))
                yield PolarTiming(name, timing.seconds, shape, base / timing.median, error)


def weight_of(shape: tuple[int, int], condition: float) -> Tensor:
    """A float64 weight with random directions and this condition, its singular values even in decades."""
    generator = torch.Generator().manual_seed(0)
    rows, cols = shape
    side = min(shape)

    def directions(count: int) -> Tensor:
        drawn = torch.randn(count, side, generator=generator, dtype=torch.float64)
        found: Tensor = torch.linalg.qr(drawn).Q
        return found

    values = torch.logspace(0, -log10(condition), side, dtype=torch.float64)
    weight: Tensor = directions(rows) * values @ directions(cols).mT
    return weight


def _plain(weight: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    factor: Tensor = left @ right
    return factor
