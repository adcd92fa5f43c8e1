"""Time GOR's penalty and gradient on the layers of ResNet-110, beside the loop that its definition suggests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ortho_cli.errors import NumericsError

from .gor import add_gor_gradients, gor_penalty
from .gor_layers import select_layers
from .side_by_side import Timing, check_device, shuffled_rounds, threads_of

__all__ = ["NAIVE", "GorTiming", "measure_gor", "naive_penalty", "resnet110_convolutions"]

NAIVE = "per-layer loop, autograd"
OURS_LOSS, OURS_GRADIENT = "gor_penalty(model), backward", "buckets, analytic gradient (the method)"
PENALTY = 1e-2
# Gradients of different summation order agree to this, relative to the largest.
TOLERANCE = 1e-5


@dataclass
class GorTiming(Timing):
    """Seconds of every round, against the loop's median."""

    speedup: float = 1.0

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return super().as_dict() | {"speedup": self.speedup}


def measure_gor(
    *, rounds: int = 30, groups: int = 32, mode: str = "inter", threads: int | None = 2, device: str = "cpu"
) -> list[GorTiming]:
    """Time penalty + gradient of the 111 convolutions, each form once a round in shuffled order.

    Args:
        rounds: how often.
        groups: the most groups a layer has.
        mode: "inter" or "intra".
        threads: of the CPU; None leaves torch's number.
        device: where the weights are.

    Returns:
        The loop first; `speedup` is its median over each form's.

    Raises:
        UsageError: no such device here.
        NumericsError: the forms do not give the same value and gradients.
    """
    check_device(device)
    with threads_of(threads):
        torch.manual_seed(0)
        model = resnet110_convolutions().to(device)
        layers, _, _ = select_layers(model, "conv", groups)

        def naive() -> Tensor:
            value = naive_penalty(model, groups, mode)
            (PENALTY * value).backward()  # type: ignore[no-untyped-call]
            return value

        def by_loss() -> Tensor:
            value = gor_penalty(model, groups, mode)
            (PENALTY * value).backward()  # type: ignore[no-untyped-call]
            return value

        def by_gradient() -> Tensor:
            value = add_gor_gradients(layers, PENALTY, mode)
            assert value is not None
            return value

        forms = {NAIVE: naive, OURS_LOSS: by_loss, OURS_GRADIENT: by_gradient}
        _check_equal(model, forms)
        timed = shuffled_rounds(forms, rounds, device).values()
    loop = next(iter(timed)).median
    return [GorTiming(timing.name, timing.seconds, loop / timing.median) for timing in timed]


def naive_penalty(model: nn.Module, groups: int, mode: str) -> Tensor:
    """The definition, layer by layer, as one would write it (and as the paper's repository computes it)."""
    total = torch.zeros((), device=next(model.parameters()).device)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            filters = module.weight.shape[0]
            count = min(groups, filters // 4)
            matrices = module.weight.reshape(count, filters // count, -1)
            if mode == "intra":
                matrices = matrices.transpose(0, 1)
            if matrices.shape[1] >= matrices.shape[2]:
                matrices = matrices.mT
            gram = matrices @ matrices.mT
            total = total + (gram - torch.eye(gram.shape[-1], device=gram.device)).square().sum()
    return total


def resnet110_convolutions() -> nn.Module:
    """The convolutions of ResNet-110 for CIFAR (shortcut B), with its initial values, and nothing else."""
    sizes = [(16, 3, 3), (32, 16, 3), (32, 16, 1), (64, 32, 3), (64, 32, 1)]
    sizes += [(16, 16, 3)] * 36 + [(32, 32, 3)] * 35 + [(64, 64, 3)] * 35
    layers = [nn.Conv2d(inputs, filters, kernel, bias=False) for filters, inputs, kernel in sizes]
    for layer in layers:
        nn.init.normal_(layer.weight, std=(2 / (layer.kernel_size[0] ** 2 * layer.out_channels)) ** 0.5)
    return nn.ModuleList(layers)


def _check_equal(model: nn.Module, forms: dict[str, Callable[[], Tensor]]) -> None:
    """A faster form of something else is no result."""
    found: dict[str, tuple[float, list[Tensor]]] = {}
    for name, form in forms.items():
        model.zero_grad()
        value = float(form().detach())
        found[name] = value, [p.grad.clone() for p in model.parameters() if p.grad is not None]
    expected, gradients = found[NAIVE]
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    for name, (value, own) in found.items():
        error = max(float((a - b).abs().max()) for a, b in zip(own, gradients, strict=True)) / largest
        if not (abs(value - expected) <= TOLERANCE * expected and error <= TOLERANCE):
            raise NumericsError(f"{name!r} gives {value}, the loop {expected}; gradients differ by {error:.1e}")
