"""Layers whose weight is a tensor train or a Tucker form: Linear and convolutions.

A convolution becomes a separable one, as in the paper's comparison: a depthwise kernel for each input channel, then a
pointwise weight `(out, in)` that is held by its cores. Its product is still an ordinary kernel,
`K[o, i] = W[o, i] D[i]`, so that the dense layer can be made again.
"""

from __future__ import annotations

from math import prod, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ortho_cli.errors import TargetError
from ortho_cli.linalg.tensor import fold_dims, tensor_ranks, tensor_train, tucker
from ortho_cli.linalg.tensor_train import (
    apply_train,
    train_decay_gradients,
    train_squared_norm,
    train_to_matrix,
    tucker_as_train,
    tucker_decay_gradients,
)

from .factored_module import FactoredModule
from .factorized_base import matricization

__all__ = ["TENSOR_STARTS", "TensorLayer"]

NAMES = {"tensor-train": ("G1", "G2", "G3"), "tucker": ("core", "A1", "A2", "A3")}
DEPTHWISE = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
TENSOR_STARTS = ("fan-out", "uniform")


class TensorLayer(FactoredModule):
    """A Linear or a convolution, its pointwise part in cores; they are zeros until `fill_` or a checkpoint fills them.

    Args:
        base: Linear, or a convolution of one group.
        kind: "tensor-train" (cores `G1`, `G2`, `G3`) or "tucker" (`core`, `A1`, `A2`, `A3`).
        scale: ranks over the dimensions that the weight's entries are folded into.

    Raises:
        TargetError: another kind of layer; with the reason.

    Reference: FNL, arXiv:2105.01029, and its code; Garipov et al. 2016, arXiv:1611.03214.

    >>> layer = TensorLayer(nn.Conv2d(16, 32, 3, padding=1), "tensor-train", 0.5)
    >>> {name: tuple(value.shape) for name, value in layer.named_parameters() if name != "bias"}
    {'depthwise': (16, 1, 3, 3), 'G1': (8, 4), 'G2': (4, 8, 4), 'G3': (4, 8)}
    >>> layer(torch.ones(2, 16, 5, 5)).shape
    torch.Size([2, 32, 5, 5])
    """

    depthwise: nn.Parameter | None

    def __init__(self, base: nn.Module, kind: str, scale: float) -> None:
        super().__init__(base)
        form = matricization(base)
        if form.kind not in ("linear", "conv") or form.groups > 1:
            what = f"a {form.kind}" + (f" of {form.groups} groups" if form.groups > 1 else "")
            raise TargetError(f"{what}, which has no {kind} form here; only Linear and plain convolutions do")
        weight = base._parameters["weight"]
        assert weight is not None
        self.kind, self.shape = kind, form.shape
        self.out, self.width = form.shape[:2]
        self.dims = fold_dims(self.out * self.width)
        self.ranks = tensor_ranks(kind, self.dims, scale)
        separable = prod(form.kernel) > 1
        kernel = weight.new_zeros(self.width, 1, *form.kernel) if separable else None
        self.depthwise = None if kernel is None else nn.Parameter(kernel, requires_grad=weight.requires_grad)
        for name, part in zip(NAMES[kind], self._decompose(weight.new_zeros(self.out, self.width)), strict=True):
            setattr(self, name, nn.Parameter(part.to(weight.dtype).contiguous(), requires_grad=weight.requires_grad))

    def forward(self, inputs: Tensor) -> Tensor:
        if len(self.shape) == 2:
            return apply_train(inputs, self.cores(), self.out) + (0 if self.bias is None else self.bias)
        conv: Any = self._outline[0]
        if conv.padding_mode != "zeros":
            pad = tuple(conv._reversed_padding_repeated_twice)
            inputs, padding = F.pad(inputs, pad, conv.padding_mode), 0
        else:
            padding = conv.padding
        spatial = self._kernel()
        where = (conv.stride, padding, conv.dilation)
        hidden = DEPTHWISE[len(self.shape)](inputs, spatial, None, *where, groups=self.width)
        channels = 1 - len(self.shape)  # the channels' axis, with or without a batch
        mixed = apply_train(hidden.movedim(channels, -1), self.cores(), self.out)
        return (mixed if self.bias is None else mixed + self.bias).movedim(-1, channels)

    def cores(self) -> tuple[Tensor, Tensor, Tensor]:
        """The pointwise weight as a train, whichever form it is kept in."""
        return self._as_train(*self.factor_parameters())

    def factor_parameters(self) -> list[nn.Parameter]:
        """The cores; the depthwise kernel is a weight like others."""
        return [getattr(self, name) for name in NAMES[self.kind]]

    @property
    def weight(self) -> Tensor:
        """The dense weight, multiplied out anew; differentiable."""
        pointwise = train_to_matrix(self.cores(), (self.out, self.width))
        if self.depthwise is None:
            return pointwise.reshape(self.shape)
        return pointwise.reshape(self.out, self.width, *[1] * (len(self.shape) - 2)) * self.depthwise.transpose(0, 1)

    def squared_norm(self, *parts: Tensor) -> Tensor:
        """The squared norm of the pointwise weight."""
        return train_squared_norm(self._as_train(*parts))

    def decay_gradients(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """The gradient of half the squared norm of the pointwise weight for each core."""
        if self.kind == "tucker":
            return tucker_decay_gradients(*parts)
        return train_decay_gradients((parts[0], parts[1], parts[2]))

    @torch.no_grad()
    def fill_(self, weight: Tensor | None, generator: torch.Generator, start: str | None = None) -> None:
        """Fill the layer from a dense weight, or with draws.

        Args:
            weight: in the dense layer's shape: its nearest separable kernel, channel by channel, and of that the
                truncated cores; None draws.
            generator: on the CPU.
            start: of the draws: "fan-out", `N(0, 2 / out)` (what the paper calls spectral here), or "uniform", its
                default `U(-1 / sqrt(in), 1 / sqrt(in))`; either is then decomposed. Depthwise kernels are drawn as
                torch draws a convolution's.
        """
        if weight is None:
            draw = torch.randn if start == "fan-out" else torch.rand
            values = draw(self.out, self.width, generator=generator)
            pointwise = values * sqrt(2 / self.out) if start == "fan-out" else (2 * values - 1) / sqrt(self.width)
            if self.depthwise is not None:
                bound = 1 / sqrt(prod(self.shape[2:]))
                self.depthwise.copy_((2 * torch.rand(self.depthwise.shape, generator=generator) - 1) * bound)
        elif self.depthwise is None:
            pointwise = weight.reshape(self.out, self.width)
        else:
            taps = weight.flatten(2).transpose(0, 1).float()  # (in, out, taps): the best rank 1 of each
            left, values, right = torch.linalg.svd(taps, full_matrices=False)
            root = values[:, 0].sqrt()
            pointwise = (left[..., 0] * root[:, None]).T
            self.depthwise.copy_((right[:, 0] * root[:, None]).reshape(self.depthwise.shape))
        device = self.factor_parameters()[0].device
        for own, part in zip(self.factor_parameters(), self._decompose(pointwise.to(device)), strict=True):
            own.copy_(part)

    def extra_repr(self) -> str:
        """The layer's shape, its form and its ranks."""
        return f"{self.kind} {self.shape}, dims={self.dims}, ranks={self.ranks}, bias={self.bias is not None}"

    def _kernel(self) -> Tensor:
        """The depthwise kernel; of a pointwise convolution, which may have a stride, one that copies."""
        if self.depthwise is not None:
            return self.depthwise
        first = self.factor_parameters()[0]
        return first.new_ones(self.width, 1, *self.shape[2:])

    def _as_train(self, *parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tucker_as_train(*parts) if self.kind == "tucker" else (parts[0], parts[1], parts[2])

    def _decompose(self, pointwise: Tensor) -> tuple[Tensor, ...]:
        return (tucker if self.kind == "tucker" else tensor_train)(pointwise, self.dims, self.ranks)
