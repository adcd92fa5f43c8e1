"""VGG19 for small pictures: sixteen convolutions with batch norm, and one linear layer in place of VGG's three."""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from ortho_cli.recipe.models import VGG as VGGConfig

__all__ = ["VGG", "build"]

# Channels of the convolutions; the picture is halved between the rows.
STAGES = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4)


def build(config: VGGConfig, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """The network of a recipe's `model` section."""
    del image_size  # convolutions and a global mean take any
    return VGG(num_classes, in_channels, width=config.width)


class VGG(nn.Module):
    """Classify small pictures with VGG19, "NFC" (no fully connected layers but the head).

    Convolutions start from N(0, 2 / (9 c_in)), the head from N(0, 0.01^2).

    Args:
        num_classes: outputs.
        in_channels: 3 for colour, 1 for grey.
        width: all channels times this.

    Shapes: `(B, in_channels, H, W)` to `(B, num_classes)`; 32x32 pictures are 2x2 where the mean over them is taken.
    Reference: Simonyan and Zisserman 2014, arXiv:1409.1556; this form: EigenDamage, arXiv:1905.05934.

    >>> sum(p.numel() for p in VGG(10).parameters())
    20035018
    """

    plain_start = "fan-in"
    """How FNL draws factors for it when they do not start from the SVD."""

    def __init__(self, num_classes: int, in_channels: int = 3, *, width: float = 1.0) -> None:
        super().__init__()
        channels = in_channels
        stages = []
        for wanted in STAGES:
            layers: list[nn.Module] = []
            for full in wanted:
                made = max(1, round(full * width))
                layers += [nn.Conv2d(channels, made, 3, padding=1, bias=False), nn.BatchNorm2d(made), nn.ReLU()]
                channels = made
            stages.append(nn.Sequential(*layers))
        self.stages = nn.ModuleList(stages)
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, sqrt(2 / (9 * module.in_channels)))
        nn.init.normal_(self.head.weight, 0.0, 0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stages[0](images)
        for stage in self.stages[1:]:
            hidden = stage(F.max_pool2d(hidden, 2, ceil_mode=True))  # a single pixel stays one
        logits: Tensor = self.head(hidden.mean((2, 3)))
        return logits
