"""The residual networks that He et al. made for ImageNet, ResNet-18, 34 and 50, with a first layer for small pictures.

Layers have torchvision's names. As usual on CIFAR, the first convolution is 3x3 at full size and no pooling follows it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from ortho_cli.recipe.models import SmallStemResNet

__all__ = ["ResNet", "build"]

STEM = 64


def build(config: SmallStemResNet, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """The network of a recipe's `model` section; the number in its name is the number of layers."""
    del image_size  # convolutions and a global mean take any
    channels = max(1, round(STEM * config.width))
    return ResNet(int(config.name.removeprefix("resnet")), num_classes, in_channels, channels=channels)


class ResNet(nn.Module):
    """Classify small pictures with 18, 34 or 50 layers in four stages.

    Convolutions start from N(0, 2 / (k^2 c_out)), norms from the identity.

    Args:
        depth: 18 or 34, of blocks of two 3x3 convolutions; 50, of a 3x3 convolution between two 1x1 ones.
        num_classes: outputs.
        in_channels: 3 for colour, 1 for grey.
        channels: of the first layer and the first stage; each further stage has twice as many, at half the size.

    Shapes: `(B, in_channels, H, W)` to `(B, num_classes)`.
    Reference: He et al. 2015, arXiv:1512.03385, table 1.

    >>> sum(p.numel() for p in ResNet(18, 10).parameters())
    11173962
    """

    def __init__(self, depth: int, num_classes: int, in_channels: int = 3, *, channels: int = STEM) -> None:
        super().__init__()
        if depth not in DESIGNS:
            raise ValueError(f"depth {depth} is none of {', '.join(map(str, DESIGNS))}")
        block, counts = DESIGNS[depth]
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        stages = []
        entering = channels
        for stage, count in enumerate(counts):
            made = []
            for index in range(count):
                made.append(block(entering, channels * 2**stage, 2 if stage and not index else 1))
                entering = channels * 2**stage * block.expansion
            stages.append(nn.Sequential(*made))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(entering, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.bn1(self.conv1(images)))
        hidden = self.layer4(self.layer3(self.layer2(self.layer1(hidden))))
        logits: Tensor = self.fc(hidden.mean((2, 3)))
        return logits


class _Basic(nn.Module):
    """Two 3x3 convolutions, each with a norm, beside a shortcut."""

    expansion = 1

    def __init__(self, entering: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(entering, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(entering, width, stride)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = F.relu(self.bn1(self.conv1(inputs)))
        hidden = self.bn2(self.conv2(hidden))
        return F.relu(hidden + (inputs if self.downsample is None else self.downsample(inputs)))


class _Bottleneck(nn.Module):
    """A 3x3 convolution between two 1x1 ones, which narrow and widen, each with a norm, beside a shortcut."""

    expansion = 4

    def __init__(self, entering: int, width: int, stride: int) -> None:
        super().__init__()
        leaving = width * self.expansion
        self.conv1 = nn.Conv2d(entering, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, leaving, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(leaving)
        self.downsample = _shortcut(entering, leaving, stride)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = F.relu(self.bn1(self.conv1(inputs)))
        hidden = F.relu(self.bn2(self.conv2(hidden)))
        hidden = self.bn3(self.conv3(hidden))
        return F.relu(hidden + (inputs if self.downsample is None else self.downsample(inputs)))


def _shortcut(entering: int, leaving: int, stride: int) -> nn.Module | None:
    if stride == 1 and entering == leaving:
        return None
    return nn.Sequential(nn.Conv2d(entering, leaving, 1, stride, bias=False), nn.BatchNorm2d(leaving))


DESIGNS: dict[int, tuple[type[_Basic | _Bottleneck], tuple[int, ...]]] = {
    18: (_Basic, (2, 2, 2, 2)),
    34: (_Basic, (3, 4, 6, 3)),
    50: (_Bottleneck, (3, 4, 6, 3)),
}
"""The kind of block, and how many each stage has."""
