"""LoRA on one layer, `W + s B A`: the reference HRA is measured against, and GOR's partner."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ortho_cli.errors import TargetError
from ortho_cli.linalg.lowrank import LowRank

from .adapter_layer import AdapterLayer, beside, convolve, stored_weight, whole

__all__ = ["LoRALayer"]


class LoRALayer(AdapterLayer):
    """A layer to whose weight a product of two thin matrices is added.

    Factors are shaped as PEFT stores them: a convolution's `A` is a kernel `(r, in, kh, kw)`, its `B` a 1 x 1.

    Args:
        base: the layer.
        up: `B (out, r)`, zero at the start.
        down: `A (r, in)`.
        scale: `alpha / r`, for rsLoRA `alpha / sqrt(r)`.
        dropout: share of the adapter's input that is dropped while training.

    Raises:
        TargetError: factors that do not fit the layer; a grouped convolution, on which PEFT's LoRA is something else.

    Reference: LoRA, arXiv:2106.09685; rsLoRA, arXiv:2312.03732.
    """

    def __init__(self, base: nn.Module, up: Tensor, down: Tensor, *, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__(base)
        shape = self.geometry
        if shape.groups > 1:
            raise TargetError(
                "a grouped convolution, on which a LoRA is no change of the weight that a file could hold",
                hint="leave the layer out",
            )
        if (up.shape[0], down[0].numel()) != (shape.out, shape.width) or up[0].numel() != down.shape[0]:
            raise TargetError(
                f"LoRA factors {tuple(up.shape)} and {tuple(down.shape)} on a layer of {shape.width} inputs and "
                f"{shape.out} outputs",
                hint="the adapter was made for another layer",
            )
        if shape.kind == "conv":
            kernel = stored_weight(self).shape
            down = down.reshape(-1, *kernel[1:])
            up = up.reshape(shape.out, -1, *[1] * (len(kernel) - 2))
        self.lora_A, self.lora_B = nn.Parameter(beside(base, down)), nn.Parameter(beside(base, up))
        self.scale, self.dropout = scale, dropout

    @property
    def rank(self) -> int:
        """The inner dimension of the factors."""
        return self.lora_A.shape[0]

    def extra_repr(self) -> str:
        """What the adapter is, for `print(model)`."""
        return f"LoRA rank={self.rank}, scale={self.scale:g}"

    def operator(self) -> LowRank:
        """The sum."""
        return LowRank(whole(self.lora_B).detach(), whole(self.lora_A).detach(), self.scale)

    def times(self, columns: Tensor) -> Tensor:
        """`(W + s B A) columns`."""
        product = self.base_times(columns)
        if not self.acts():
            return product
        up, down = (factor.flatten(1) for factor in self._factors())
        return product + self.scale * self.strength * (up @ (down @ columns.to(down.dtype))).to(product.dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The adapted layer; further arguments are the frozen layer's."""
        output: Tensor = self.fixed_linear(x, *args, **kwargs)
        if not self.acts():
            return output
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        up, down = self._factors()
        down, up = down.to(x.dtype), (self.scale * self.strength * up).to(x.dtype)
        if self.geometry.kind != "conv":
            return output + F.linear(F.linear(x, down), up)
        return output + convolve(self, x, down, up)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """B and A; at another strength than 1 constants, as reflections are."""
        if self.strength != 1:
            return self.lora_B.detach(), self.lora_A.detach()
        return self.lora_B, self.lora_A
