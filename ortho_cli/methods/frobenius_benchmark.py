"""Time Frobenius decay beside the training step it is added to, and beside autograd through the products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ortho_cli.errors import NumericsError
from ortho_cli.registry import resolve

from .factored_module import FactoredModule
from .factorized_model import factorize_
from .frobenius_decay import frobenius_decay_
from .side_by_side import Timing, check_device, shuffled_rounds, threads_of

__all__ = ["AUTOGRAD", "OURS", "STEP", "FrobeniusTiming", "measure_frobenius"]

STEP = "training step"
OURS, AUTOGRAD = "decay, closed form (the method)", "decay, autograd through the products"
COEF = 1e-4
CLASSES, PIXELS = 10, 32
# Gradients of the two forms agree to this, relative to the largest.
TOLERANCE = 1e-5


@dataclass
class FrobeniusTiming(Timing):
    """Seconds of every round; `share` over the training step, `speedup` over autograd, both of medians."""

    share: float = 1.0
    speedup: float = 1.0

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return super().as_dict() | {"share": self.share, "speedup": self.speedup}


def measure_frobenius(
    *,
    rounds: int = 30,
    batch: int = 128,
    target_ratio: float = 0.1,
    width: float = 1.0,
    threads: int | None = 2,
    device: str = "cpu",
) -> list[FrobeniusTiming]:
    """Time a training step of a factored ResNet32x2, and its decay alone in two forms, in shuffled rounds.

    Args:
        rounds: of the decays; a step takes part in the first few only.
        batch: pictures a step, 32x32.
        target_ratio: parameters of the factored network over the dense one's.
        width: of the network.
        threads: of the CPU; None leaves torch's number.
        device: where to train.

    Returns:
        The step, the closed form, autograd.

    Raises:
        UsageError: no such device here, or a ratio out of reach.
        NumericsError: the two forms do not give the same gradients.
    """
    from ortho_cli.recipe.models import ResNet32x2

    check_device(device)
    with threads_of(threads):
        torch.manual_seed(0)
        section = ResNet32x2(name="resnet32x2", width=width)
        model: nn.Module = resolve("models", "resnet32x2")(section, CLASSES, 3, PIXELS).to(device)
        layers = list(factorize_(model, target_ratio=target_ratio).values())
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        images = torch.randn(batch, 3, PIXELS, PIXELS, device=device)
        labels = torch.randint(CLASSES, (batch,), device=device)

        def step() -> None:
            optimizer.zero_grad()
            loss: Tensor = F.cross_entropy(model(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        forms: dict[str, Callable[[], None]] = {
            STEP: step, OURS: lambda: frobenius_decay_(layers, COEF), AUTOGRAD: lambda: by_autograd(layers),
        }  # fmt: skip
        _check_equal(model, layers)
        step()
        timed = shuffled_rounds(forms, rounds, device, slow=(STEP,))
    whole, slow = timed[STEP].median, timed[AUTOGRAD].median
    return [
        FrobeniusTiming(timing.name, timing.seconds, timing.median / whole, slow / timing.median)
        for timing in timed.values()
    ]


def by_autograd(layers: Sequence[FactoredModule]) -> None:
    """The definition: half the squared norm of every product, differentiated."""
    penalty = sum((layer.weight.square().sum() for layer in layers), torch.zeros((), device=layers[0].weight.device))
    (COEF / 2 * penalty).backward()  # type: ignore[no-untyped-call]


def _check_equal(model: nn.Module, layers: Sequence[FactoredModule]) -> None:
    """A faster form of something else is no result."""
    found = []
    forms: list[Callable[[], None]] = [lambda: frobenius_decay_(layers, COEF), lambda: by_autograd(layers)]
    for form in forms:
        model.zero_grad()
        form()
        found.append([p.grad.clone() for layer in layers for p in layer.factor_parameters() if p.grad is not None])
    largest = max(float(gradient.abs().max()) for gradient in found[1])
    error = max(float((a - b).abs().max()) for a, b in zip(*found, strict=True)) / largest
    if not error <= TOLERANCE:
        raise NumericsError(f"the closed form's gradients differ from autograd's by {error:.1e} of the largest")
