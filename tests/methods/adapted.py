"""Small adapted models, and how to bring an adapter away from its start."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ortho_cli.methods.adapter_layer import AdapterLayer


def shaken(model: nn.Module, spread: float = 0.3, seed: int = 0) -> nn.Module:
    """The model with every adapter somewhere else than it started."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.modules():
            for parameter in layer.adapter_parameters() if isinstance(layer, AdapterLayer) else []:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.add_(spread * noise.to(parameter))
    return model


def gap(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max())


class OnlyMultiplies(nn.Module):
    """A quantised layer in miniature: 8-bit rows that nobody can read, a forward that multiplies by them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)
