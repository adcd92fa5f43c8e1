"""Time a pass of the whitening layer in training beside the published one: Pade approximant, Lyapunov gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from ortho_cli.linalg.rootm import inverse_sqrtm

from .polar_benchmark import weight_of
from .side_by_side import Timing, check_device, shuffled_rounds, threads_of
from .whitening import Whitening, grouped

__all__ = ["PUBLISHED", "PublishedWhitening", "WhitenTiming", "measure_whiten"]

PUBLISHED = "published: Pade and Lyapunov"
OURS = {"whitening: eigh": "eigh", "whitening: Newton-Schulz": "newton-schulz"}
RUNNING = 0.1  # share of a batch in running statistics


@dataclass
class WhitenTiming(Timing):
    """Seconds of every round; `ratio` of medians over the published form, `error` of its whitening matrices.

    The error is `||D - D64|| / ||D64||`, D64 the inverse root of the same covariance with the ridge in float64.
    """

    width: int = 0
    groups: int = 0
    ratio: float = 1.0
    error: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        added = {"width": self.width, "groups": self.groups, "ratio": self.ratio, "error": self.error}
        return super().as_dict() | added


class PublishedWhitening(nn.Module):
    """Decorrelated batch norm as it was published with arXiv:2207.02119, but all groups in one batch of matrices."""

    running_mean: Tensor
    running_subspace: Tensor

    def __init__(self, features: int, groups: int, ridge: float) -> None:
        super().__init__()
        width = features // groups
        self.ridge = ridge
        self.weight = nn.Parameter(torch.ones(groups, width, 1))
        self.bias = nn.Parameter(torch.zeros(groups, width, 1))
        self.register_buffer("running_mean", torch.zeros(groups, width, 1))
        self.register_buffer("running_subspace", torch.eye(width).repeat(groups, 1, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        groups, width = self.weight.shape[:2]
        values = inputs.transpose(0, 1).contiguous().view(groups, width, -1)
        mean = values.mean(-1, keepdim=True)
        centered = values - mean
        eye = torch.eye(width, dtype=inputs.dtype, device=inputs.device)
        covariance = centered @ centered.mT / centered.shape[-1] + self.ridge * eye
        whitening = inverse_sqrtm(covariance, method="mpa")
        outputs = (whitening @ centered) * self.weight + self.bias
        with torch.no_grad():
            self.running_mean.lerp_(mean, RUNNING)
            self.running_subspace.lerp_(whitening, RUNNING)
        return outputs.view(groups * width, inputs.shape[0], *inputs.shape[2:]).transpose(0, 1).contiguous()


def measure_whiten(
    widths: Sequence[int],
    groups: Sequence[int],
    *,
    batch: int = 32,
    side: int = 16,
    condition: float = 1e3,
    ridge: float = 1e-3,
    rounds: int = 5,
    threads: int = 2,
    device: str = "cpu",
) -> Iterator[WhitenTiming]:
    """Time forward and backward of every form at every size, in shuffled rounds; the published form first.

    Args:
        widths: channels that are whitened together.
        groups: how many times these, in one layer.
        batch: pictures.
        side: of a picture, in pixels.
        condition: of the channels' covariance, whose largest eigenvalue is about 1.
        ridge: of every form.
        rounds: how often.
        threads: of the CPU.
        device: where.

    Raises:
        UsageError: a device that is not here.
    """
    check_device(device)
    with threads_of(threads):
        for width in widths:
            for count in groups:
                inputs = _inputs(width, count, batch, side, condition).to(device).requires_grad_()
                layers: dict[str, nn.Module] = {PUBLISHED: PublishedWhitening(width * count, count, ridge)}
                layers |= {name: Whitening(width * count, count, ridge=ridge, solver=OURS[name]) for name in OURS}
                layers["batch norm, for scale"] = nn.BatchNorm2d(width * count)
                forms: dict[str, Callable[[], object]] = {
                    name: partial(_step, layer.to(device), inputs, torch.randn_like(inputs))
                    for name, layer in layers.items()
                }
                for form in forms.values():
                    form()  # warm
                timed = shuffled_rounds(forms, rounds, device)
                base = timed[PUBLISHED].median
                for name, timing in timed.items():
                    error = _error(name, inputs.detach(), count, ridge)
                    yield WhitenTiming(name, timing.seconds, width, count, timing.median / base, error)


def _step(layer: nn.Module, inputs: Tensor, gradient: Tensor) -> None:
    layer.zero_grad()
    inputs.grad = None
    layer(inputs).backward(gradient)


def _inputs(width: int, groups: int, batch: int, side: int, condition: float) -> Tensor:
    """Pictures whose channels, group by group, have a covariance of this condition, even in decades."""
    generator = torch.Generator().manual_seed(0)
    mix = weight_of((width, width), sqrt(condition)).float()
    raw = torch.randn(batch, groups, width, side * side, generator=generator)
    return (mix @ raw).reshape(batch, groups * width, side, side)


def _error(name: str, inputs: Tensor, groups: int, ridge: float) -> float | None:
    """How far the whitening matrices of a form are from those of float64; None for what does not whiten."""
    solver = "mpa" if name == PUBLISHED else OURS.get(name)
    if solver is None:
        return None
    rows = grouped(inputs.cpu().double(), groups)
    covariance = torch.stack([torch.cov(group, correction=0) for group in rows])
    exact = inverse_sqrtm(covariance, ridge=ridge)
    found = inverse_sqrtm(covariance.float(), ridge=ridge, method=solver).double()
    return float((found - exact).norm() / exact.norm())
