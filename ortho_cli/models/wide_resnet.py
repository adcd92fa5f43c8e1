"""Wide residual networks for small pictures: norms before convolutions, stages of 16, 32 and 64 times the width."""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from ortho_cli.recipe.models import WideResNet as WideResNetConfig

__all__ = ["WideResNet", "build"]

STEM = 16


def build(config: WideResNetConfig, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """The network of a recipe's `model` section."""
    del image_size  # convolutions and a global mean take any
    return WideResNet(config.depth, config.width, num_classes, in_channels)


class WideResNet(nn.Module):
    """Classify small pictures with a WRN of `depth` = 6n + 4 layers.

    Convolutions start from N(0, 2 / (k^2 c_out)), the head's bias from zero.

    Args:
        depth: 10, 16, 22, 28, 40 or any other 6n + 4.
        width: channels over 16, 32 and 64.
        num_classes: outputs.
        in_channels: 3 for colour, 1 for grey.

    Shapes: `(B, in_channels, H, W)` to `(B, num_classes)`.
    Reference: Zagoruyko and Komodakis 2016, arXiv:1605.07146.

    >>> sum(p.numel() for p in WideResNet(28, 10, 10).parameters())
    36479194
    """

    plain_start = "fan-out"
    """How FNL draws factors for it when they do not start from the SVD."""

    def __init__(self, depth: int, width: int, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"a wide ResNet has 6n + 4 layers, not {depth}")
        self.conv1 = nn.Conv2d(in_channels, STEM, 3, padding=1, bias=False)
        stages = []
        channels = STEM
        for stage in range(3):
            made = []
            for index in range(blocks):
                wanted = STEM * width * 2**stage
                made.append(_Block(channels, wanted, 2 if stage and not index else 1))
                channels = wanted
            stages.append(nn.Sequential(*made))
        self.layer1, self.layer2, self.layer3 = stages
        self.norm = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels)))
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.layer3(self.layer2(self.layer1(self.conv1(images))))
        logits: Tensor = self.fc(F.relu(self.norm(hidden)).mean((2, 3)))
        return logits


class _Block(nn.Module):
    """Two 3x3 convolutions, each after norm and ReLU, beside a shortcut; a 1x1 convolution where the width changes."""

    def __init__(self, channels: int, wanted: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, wanted, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(wanted)
        self.conv2 = nn.Conv2d(wanted, wanted, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(channels, wanted, 1, stride, bias=False) if channels != wanted else None

    def forward(self, inputs: Tensor) -> Tensor:
        active = F.relu(self.norm1(inputs))
        hidden: Tensor = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return hidden + (inputs if self.shortcut is None else self.shortcut(active))
