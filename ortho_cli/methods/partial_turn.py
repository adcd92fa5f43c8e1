r"""An HRA layer between its base and its adapter: `D^s = I + Z (K^s - I) Z^T`, kept from call to call.

Only `Z (d, k)`, `Z (K^s - I)` and the vectors they were made of are kept, beside the layer's state and not in it, and
made anew when the strength or the vectors have changed. Values are compared: what is written through `.data`, as
averages of weights are, leaves no other trace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .adapter_layer import whole
from .reflecting import autocast_off, to_autocast

if TYPE_CHECKING:
    from .hra_layer import HRALayer

__all__ = ["PartialTurn", "Turn"]


class Turn(NamedTuple):
    """`D^s = I + left basis^T`."""

    basis: Tensor
    left: Tensor
    change: Tensor

    def turn(self, x: Tensor, *, transpose: bool = False) -> Tensor:
        """`x D^T`, or `x D`, for activations `(..., d)` in any float type; differentiable in `x`."""
        x = to_autocast(x)
        with autocast_off(x):
            inner, outer = (self.left, self.basis) if transpose else (self.basis, self.left)
            return x + (x @ inner.to(x.dtype)) @ outer.to(x.dtype).T

    def low_rank(self, multiply: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """`B (out, k)`, `A (k, width)` with `W D = W + B A`, for a weight that is given by what it does to columns."""
        with autocast_off(self.basis):
            return multiply(self.basis).to(self.basis.dtype) @ self.change, self.basis.T


class PartialTurn:
    """The turn of one layer, remembered."""

    def __init__(self) -> None:
        self._turn: Turn | None = None
        self._strength = 1.0
        self._made_of: list[Tensor] = []

    def of(self, layer: HRALayer) -> Turn:
        """The layer's turn at its strength, from its vectors as they are now.

        Raises:
            TargetError: it has none: an odd number of reflections, or soft ones.
        """
        made_of = [whole(tensor).detach() for tensor in (layer.vectors, layer.start) if tensor is not None]
        if self._turn is None or layer.strength != self._strength or not all(map(_same, made_of, self._made_of)):
            vectors = layer.vectors
            with torch.no_grad():
                rotation = layer.operator().rotation().power(layer.strength)
                core = rotation.core.to(rotation.basis.device)
                change = core - torch.eye(core.shape[0], dtype=core.dtype, device=core.device)
                parts = (rotation.basis, rotation.basis @ change, change)
                self._turn = Turn(*(part.to(vectors.device, vectors.dtype) for part in parts))
            self._strength, self._made_of = layer.strength, [tensor.clone() for tensor in made_of]
        return self._turn


def _same(tensor: Tensor, kept: Tensor) -> bool:
    return (tensor.device, tensor.dtype) == (kept.device, kept.dtype) and torch.equal(tensor, kept)
