"""An exponential moving average of the weights that train, in float32, swapped in for evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["Average"]


class Average:
    """Average parameters with ``value <- decay value + (1 - decay) parameter`` after every step.

    Args:
        decay: in ``(0, 1)``; 0.999 remembers about a thousand steps.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.values: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take one step's weights in; parameters seen for the first time, or resized, start at their value."""
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            held = self.values.get(name)
            if held is None or held.shape != parameter.shape:
                self.values[name] = parameter.detach().float().clone()
            else:
                held.lerp_(parameter.detach().float(), 1 - self.decay)

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """The model with averaged weights while the block runs."""
        parameters = {name: parameter for name, parameter in model.named_parameters() if name in self.values}
        own = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self.values[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(own[name])
