"""Whether drawn pictures keep to canny hints: the F1 of edges, as sums that add up over batches and processes."""

from __future__ import annotations

import torch
from torch import Tensor

from .hint_samples import edge_picture
from .picture_grid import to_bytes

__all__ = ["edge_f1"]


def edge_f1(drawn: Tensor, real: Tensor, thresholds: tuple[float, float]) -> Tensor:
    """The F1 of each drawn picture's canny edges against the real one's; 1 where neither has any.

    Args:
        drawn: `(B, 3, H, W)` in [-1, 1].
        real: the pictures that the hints are from, of the same shape.
        thresholds: of the edges.

    Returns:
        `(B,)` float64, on the CPU.

    >>> edge_f1(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8), (100.0, 200.0)).tolist()
    [1.0]
    """
    found = []
    for mine, other in zip(to_bytes(drawn).cpu(), to_bytes(real).cpu(), strict=True):
        edges, wanted = (edge_picture(picture, thresholds)[0].bool() for picture in (mine, other))
        total = int(edges.sum() + wanted.sum())
        found.append(2 * int((edges & wanted).sum()) / total if total else 1.0)
    return torch.tensor(found, dtype=torch.float64)
