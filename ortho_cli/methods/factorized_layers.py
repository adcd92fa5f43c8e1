"""Layers whose weight is a product `U VT`, or `U M VT`: linear and embedding; convolutions are in `factorized_conv.py`.

A layer is applied factor by factor, or as one with the product for its weight, whichever is the less work for the input
at hand.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .factorized_base import FactorizedLayer, matricization
from .factorized_conv import FactorizedConv

__all__ = ["FactorizedConv", "FactorizedEmbedding", "FactorizedLayer", "FactorizedLinear", "factorized_layer"]


def factorized_layer(
    base: nn.Module, rank: int, *, square: bool = False, row_axes: int | None = None
) -> FactorizedLayer:
    """Make the factored form of a layer, with its bias; the factors are zeros, to be filled or loaded.

    Args:
        base: Linear, transformers' Conv1D, Embedding, or a convolution (1-d to 3-d, grouped, transposed).
        rank: components (of each group).
        square: with a third factor `M` between the two, which starts as the identity.
        row_axes: of a convolution's kernel, as `Matricization` takes them.

    Raises:
        TargetError: a layer that has no factored form; with the reason.

    >>> layer = factorized_layer(nn.Conv2d(4, 6, 3, padding=1), rank=2)
    >>> tuple(layer.U.shape), tuple(layer.VT.shape)
    ((18, 2), (2, 12))
    """
    form = matricization(base)
    kinds = {"conv": FactorizedConv, "transposed": FactorizedConv, "embedding": FactorizedEmbedding}
    return kinds.get(form.kind, FactorizedLinear)(base, rank, square=square, row_axes=row_axes)


class FactorizedLinear(FactorizedLayer):
    """`x -> U (VT x) + bias`, for Linear and transformers' Conv1D.

    >>> import torch
    >>> layer = factorized_layer(nn.Linear(6, 4), rank=2)
    >>> layer(torch.randn(3, 6)).shape, layer.in_features
    (torch.Size([3, 4]), 6)
    """

    def forward(self, inputs: Tensor) -> Tensor:
        u, vt = self.pair()
        rows, cols = self.form.rows, self.form.cols
        samples = inputs.numel() // cols
        if rows * cols * (self.rank + samples) < samples * self.rank * (rows + cols):
            return F.linear(inputs, u @ vt, self.bias)
        return F.linear(F.linear(inputs, vt), u, self.bias)


class FactorizedEmbedding(FactorizedLayer):
    """Rows of `U`, times `VT`.

    >>> import torch
    >>> factorized_layer(nn.Embedding(10, 4), rank=2)(torch.tensor([1, 9])).shape
    torch.Size([2, 4])
    """

    def forward(self, indices: Tensor) -> Tensor:
        rows = F.embedding(indices, self.U, self.padding_idx)
        return rows @ (self.VT if self.M is None else self.M @ self.VT)
