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

    >>> model, average = nn.Linear(1, 1, bias=False), Average(0.75)
    >>> for value in (0.0, 4.0):
    ...     _ = nn.init.constant_(model.weight, value)
    ...     average.update(model)
    >>> with average.swapped(model):
    ...     model.weight.item()
    1.0
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.values: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take one step's weights in; parameters seen for the first time, or resized, start at their value."""
        weights = {
            name: parameter.detach().float() for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        known = [name for name, weight in weights.items() if _shape(self.values.get(name)) == weight.shape]
        held = [self.values[name] for name in known]
        if held:
            torch._foreach_lerp_(held, [weights[name] for name in known], 1 - self.decay)
        averaged = dict(zip(known, held, strict=True))
        self.values = {name: averaged[name] if name in averaged else weights[name].clone() for name in weights}

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


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape
