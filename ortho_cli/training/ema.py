"""An exponential moving average of the weights that train, in float32, swapped in for evaluation.

The statistics of batch norm are averaged with them: those of other weights would spoil what is judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["Average"]


class Average:
    """Average parameters with ``value <- decay value + (1 - decay) parameter`` after every step.

    Args:
        decay: in ``(0, 1)``; 0.999 remembers about a thousand steps.
        part: the name of the submodule that is averaged; empty: the whole model.

    >>> model, average = nn.Linear(1, 1, bias=False), Average(0.75)
    >>> for value in (0.0, 4.0):
    ...     _ = nn.init.constant_(model.weight, value)
    ...     average.update(model)
    >>> with average.swapped(model):
    ...     model.weight.item()
    1.0
    """

    def __init__(self, decay: float, part: str = "") -> None:
        self.decay = decay
        self.part = part
        self.values: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take one step's weights in; parameters seen for the first time, or resized, start at their value."""
        weights = {name: tensor.detach().float() for name, tensor in _averaged(model, self.part)}
        known = [name for name, weight in weights.items() if _shape(self.values.get(name)) == weight.shape]
        held = [self.values[name] for name in known]
        if held:
            torch._foreach_lerp_(held, [weights[name] for name in known], 1 - self.decay)
        averaged = dict(zip(known, held, strict=True))
        self.values = {name: averaged[name] if name in averaged else weights[name].clone() for name in weights}

    @torch.no_grad()
    def carry(self, old: str, new: str, image: Callable[[Tensor], Tensor]) -> None:
        """Let the average of a parameter go on as that of one in its place, by name; `image` is what it becomes."""
        if old in self.values:
            self.values[new] = image(self.values.pop(old))

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """The model with averaged weights while the block runs."""
        tensors = {name: tensor for name, tensor in _averaged(model, self.part) if name in self.values}
        own = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(self.values[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in tensors.items():
                    tensor.copy_(own[name])


def _averaged(model: nn.Module, part: str) -> Iterator[tuple[str, Tensor]]:
    """What trains in a part, and the running statistics of its norms, by their names in the model."""
    chosen = model.get_submodule(part)
    yield from ((name, each) for name, each in chosen.named_parameters(part) if each.requires_grad)
    for prefix, module in chosen.named_modules(prefix=part):
        if isinstance(module, _NormBase):
            for name, buffer in module.named_buffers(prefix, recurse=False):
                if buffer.is_floating_point():
                    yield name, buffer


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape
