"""What every layer with a product for its weight has in common: matrix factors and tensor cores alike."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FactoredModule"]


class FactoredModule(nn.Module, ABC):
    """A layer that stands for another. Attributes it lacks are those of the layer it stands for.

    The functions that take `parts` compute with whole tensors in the order of `factor_parameters`, which may be the
    gathered ones of a sharded model.

    Args:
        base: the layer to stand for; its bias is taken over, its weight is not kept.
    """

    bias: nn.Parameter | None

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.register_parameter("bias", base._parameters.get("bias"))
        self._outline = (_outline(base),)  # in a tuple, so that it is no child
        self.train(base.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "_outline" not in self.__dict__:
                raise
            return getattr(self._outline[0], name)

    @abstractmethod
    def factor_parameters(self) -> list[nn.Parameter]:
        """What the product is made of."""

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """The dense weight, multiplied out anew; differentiable."""

    @abstractmethod
    def squared_norm(self, *parts: Tensor) -> Tensor:
        """The squared Frobenius norm of the product, which is not formed; 0-dimensional, differentiable."""

    @abstractmethod
    def decay_gradients(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """The gradient of half the squared norm for each part, in at least float32."""

    @torch.no_grad()
    def scale_(self, factor: Tensor) -> None:
        """Multiply the product, by an equal share of each of its parts."""
        parts = self.scaled_parameters()
        for part in parts:
            part.mul_(factor ** (1 / len(parts)))

    def scaled_parameters(self) -> list[nn.Parameter]:
        """The parts that `scale_` changes."""
        return self.factor_parameters()

    def dense(self) -> nn.Module:
        """The layer it stands for, with the product for its weight and tensors of its own."""
        layer = copy.deepcopy(self._outline[0])
        trains = any(parameter.requires_grad for parameter in self.factor_parameters())
        with torch.no_grad():
            for name in ("weight", "bias"):
                own = getattr(self, name)
                if own is not None:
                    value = own.detach().clone(memory_format=torch.contiguous_format)
                    layer._parameters[name] = nn.Parameter(value, requires_grad=trains)
        return layer.train(self.training)


def _outline(layer: nn.Module) -> nn.Module:
    """The same layer without memory."""
    outline = copy.copy(layer)
    outline._parameters = {
        name: None if value is None else nn.Parameter(value.detach().to("meta"), value.requires_grad)
        for name, value in layer._parameters.items()
    }
    return outline
