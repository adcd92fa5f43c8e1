"""Differentiable augmentation: the same random changes for real and generated pictures, with gradients through them.

A discriminator of few pictures learns them by heart; one that only ever sees changed pictures cannot, and the generator
is not taught the changes since both sides have them. Zhao et al. 2020, arXiv:2006.10738.

Every draw comes in as a number of the sample, so that the result does not depend on batches and processes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["DRAWS", "augment"]

DRAWS = 12  # uniform numbers a sample: one for each policy whether it is applied, and seven for how
SHIFT = 1 / 8  # of the side
CUT = 1 / 2  # side of the square that is cut out, of the picture's


def augment(pictures: Tensor, draws: Tensor, share: float = 1.0) -> Tensor:
    """Change brightness, saturation and contrast, shift, and cut out a square.

    Args:
        pictures: ``(B, C, H, W)``, in [-1, 1].
        draws: ``(B, DRAWS)`` in [0, 1).
        share: the probability of each change.

    Returns:
        As `pictures`; black is -1 where they were shifted away (in the release grey), grey 0 where they were cut.

    >>> pictures = torch.rand(2, 3, 8, 8)
    >>> torch.equal(augment(pictures, torch.rand(2, DRAWS), share=0.0), pictures)
    True
    """
    applied = (draws[:, :5] < share)[:, :, None, None, None]
    how = draws[:, 5:, None, None, None].to(pictures.dtype)
    brighter = pictures + (how[:, 0] - 0.5)
    pictures = torch.where(applied[:, 0], brighter, pictures)
    grey = pictures.mean(1, keepdim=True)
    pictures = torch.where(applied[:, 1], torch.lerp(grey, pictures, 2 * how[:, 1]), pictures)
    mean = pictures.mean((1, 2, 3), keepdim=True)
    pictures = torch.where(applied[:, 2], torch.lerp(mean, pictures, how[:, 2] + 0.5), pictures)
    pictures = torch.where(applied[:, 3], _shifted(pictures, draws[:, 8:10]), pictures)
    return torch.where(applied[:, 4] & _cut(pictures, draws[:, 10:12]), torch.zeros_like(pictures), pictures)


def _shifted(pictures: Tensor, draws: Tensor) -> Tensor:
    """Moved by up to an eighth of the side; what moves in is black."""
    side = pictures.shape[-1]
    most = round(SHIFT * side)
    padded = F.pad(pictures, (most,) * 4, value=-1.0)
    start = (draws * (2 * most + 1)).long().clamp(max=2 * most)  # in float32 a draw may round to 1
    places = torch.arange(side, device=pictures.device)
    rows = (start[:, :1] + places)[:, None, :, None].expand(-1, *pictures.shape[1:3], padded.shape[-1])
    columns = (start[:, 1:] + places)[:, None, None, :].expand(-1, *pictures.shape[1:])
    return padded.gather(2, rows).gather(3, columns)


def _cut(pictures: Tensor, draws: Tensor) -> Tensor:
    """Which pixels lie in a square around a random place, `(B, 1, H, W)`."""
    side = pictures.shape[-1]
    half = round(CUT * side) / 2
    near = (torch.arange(side, device=pictures.device) + 0.5 - (draws * side)[:, :, None]).abs() <= half
    return near[:, None, 0, :, None] & near[:, None, 1, None, :]
