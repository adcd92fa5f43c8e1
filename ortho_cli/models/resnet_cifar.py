"""The residual networks that He et al. made for CIFAR: 6n + 2 layers, three stages of 16, 32 and 64 channels or more.

They work on pictures of any size and number of channels; at 8x8 the stages are 8, 4 and 2 pixels wide.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import TYPE_CHECKING, Literal

import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from ortho_cli.recipe.models import ResNet, ResNet32x2

__all__ = ["CifarResNet", "build", "build_resnet32x2"]

WIDTHS = (16, 32, 64)
RESNET32X2_WIDTHS = (64, 128, 256)
# GOR's groups are four filters or more, and its GroupNorm has the same groups; with fewer a group says little.
MIN_GROUP_CHANNELS = 4
# The head of the GOR paper's script: `num_classes` was never passed on, so its models end in ImageNet's 1000 outputs.
PAPER_HEAD = 1000

Norm = Literal["batch", "group"]
Shortcut = Literal["A", "B"]


def build(config: ResNet, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """The network of a recipe's `model` section; the number in its name is the number of layers."""
    del image_size  # convolutions and a global mean take any
    return CifarResNet(
        int(config.name.removeprefix("resnet")),
        PAPER_HEAD if config.compat == "paper-head" else num_classes,
        in_channels,
        norm=config.norm,
        groups=config.groups,
        shortcut=config.shortcut,
    )


def build_resnet32x2(config: ResNet32x2, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """The wider ResNet-32 of EigenDamage and FNL, with projections where the width changes."""
    del image_size
    widths = tuple(max(1, round(channels * config.width)) for channels in RESNET32X2_WIDTHS)
    return CifarResNet(32, num_classes, in_channels, shortcut="B", widths=widths)


class CifarResNet(nn.Module):
    """Classify small pictures with `depth` = 6n + 2 layers, where He et al. took n = 3, 5, 7, 9, 18.

    Convolutions start from N(0, 2 / (k^2 c_out)), norms from the identity, and are made in the order of the GOR
    paper's script, so that a seed gives its weights (110 layers, shortcut B, 1000 classes).

    Args:
        depth: 20, 32, 44, 56, 110 or any other 6n + 2.
        num_classes: outputs.
        in_channels: 3 for colour, 1 for grey.
        norm: `batch`, or `group` with `min(groups, channels // 4)` groups.
        groups: most groups a GroupNorm has.
        shortcut: what a block adds where it halves the picture: `A` every second pixel with zeros for the new
            channels (no parameters), `B` a 1x1 convolution and a norm.
        widths: channels of the three stages.

    Shapes: `(B, in_channels, H, W)` to `(B, num_classes)`.
    Reference: He et al. 2015, arXiv:1512.03385, section 4.2.

    >>> sum(p.numel() for p in CifarResNet(20, 10).parameters())
    269722
    """

    def __init__(
        self,
        depth: int,
        num_classes: int,
        in_channels: int = 3,
        *,
        norm: Norm = "batch",
        groups: int = 32,
        shortcut: Shortcut = "A",
        widths: Sequence[int] = WIDTHS,
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"a CIFAR ResNet has 6n + 2 layers, not {depth}")
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.norm1 = _norm(norm, groups, widths[0])
        stages = []
        width = widths[0]
        for channels in widths:
            made = []
            for index in range(blocks):
                stride = 2 if index == 0 and channels > widths[0] else 1
                downsample = _shortcut(shortcut, norm, groups, width, channels, stride)
                made.append(_Block(width, channels, stride, norm, groups, downsample))
                width = channels
            stages.append(nn.Sequential(*made))
        self.layer1, self.layer2, self.layer3 = stages
        self.fc = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels)))

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(self.conv1(images)))
        hidden = self.layer3(self.layer2(self.layer1(hidden)))
        logits: Tensor = self.fc(hidden.mean((2, 3)))
        return logits


class _Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(
        self, width: int, channels: int, stride: int, norm: Norm, groups: int, downsample: nn.Module | None
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, channels, 3, stride, padding=1, bias=False)
        self.norm1 = _norm(norm, groups, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = _norm(norm, groups, channels)
        self.downsample = downsample

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(self.conv1(inputs)))
        hidden = self.norm2(self.conv2(hidden))
        return F.relu(hidden + (inputs if self.downsample is None else self.downsample(inputs)))


class _ZeroPad(nn.Module):
    """Shortcut A: every `stride`-th pixel, and zeros for the channels that are new, behind the old ones."""

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels = new_channels
        self.stride = stride

    def forward(self, inputs: Tensor) -> Tensor:
        return F.pad(inputs[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


def _shortcut(kind: Shortcut, norm: Norm, groups: int, width: int, channels: int, stride: int) -> nn.Module | None:
    if stride == 1 and width == channels:
        return None
    if kind == "A":
        return _ZeroPad(channels - width, stride)
    return nn.Sequential(nn.Conv2d(width, channels, 1, stride, bias=False), _norm(norm, groups, channels))


def _norm(kind: Norm, groups: int, channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(min(groups, channels // MIN_GROUP_CHANNELS), channels)
