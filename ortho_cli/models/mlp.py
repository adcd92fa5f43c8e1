"""Fully connected layers on the flattened picture: the smallest model that every method for Linear works on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from ortho_cli.recipe.models import MLP as MLPConfig

__all__ = ["MLP", "build"]


def build(config: MLPConfig, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """The network of a recipe's `model` section."""
    return MLP(in_channels * image_size**2, config.hidden, num_classes)


class MLP(nn.Module):
    """Classify by Linear layers with ReLU between them.

    Args:
        inputs: numbers in a sample.
        hidden: widths of the hidden layers; none gives a linear classifier.
        num_classes: outputs.

    Shapes: `(B, ...)` with `inputs` numbers a sample, to `(B, num_classes)`.

    >>> sum(p.numel() for p in MLP(64, [64, 64], 10).parameters())
    8970
    """

    def __init__(self, inputs: int, hidden: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise([inputs, *hidden]))
        self.head = nn.Linear([inputs, *hidden][-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = images.flatten(1)
        for layer in self.layers:
            hidden = F.relu(layer(hidden))
        logits: Tensor = self.head(hidden)
        return logits
