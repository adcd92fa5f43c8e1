"""Pictures side by side in one file."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate, pad

__all__ = ["grid", "save_grid", "to_bytes"]

GAP = 1  # white pixels between two pictures
JPEG_QUALITY = 95
LEAST = 32  # pixels of a side that can be looked at; smaller pictures are enlarged by a whole number


def to_bytes(pictures: Tensor) -> Tensor:
    """Values in [-1, 1] as bytes.

    >>> to_bytes(torch.tensor([-1.0, 0.0, 1.0])).tolist()
    [0, 128, 255]
    """
    return pictures.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def grid(pictures: Tensor, columns: int | None = None, *, enlarge: bool = True) -> NDArray[np.uint8]:
    """Put pictures side by side, row by row.

    Args:
        pictures: `(N, C, H, W)` in [-1, 1], grey or colour.
        columns: pictures a row; None: as many as there are rows.
        enlarge: make small pictures large enough to look at, with a gap between them; else pixel by pixel, without.

    Returns:
        `(height, width, C)`; what is left of the last row is white.

    >>> grid(torch.zeros(3, 1, 16, 16)).shape
    (65, 65, 1)
    """
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    scale, gap = (max(1, -(-LEAST // pictures.shape[-1])), GAP) if enlarge else (1, 0)
    large = interpolate(to_bytes(pictures).cpu().float(), scale_factor=scale, mode="nearest").byte()
    framed = pad(large, (0, gap, 0, gap), value=255)
    lacking = -len(framed) % columns
    framed = torch.cat([framed, framed.new_full((lacking, *framed.shape[1:]), 255)])
    rows = [torch.cat(list(row), dim=2) for row in torch.split(framed, columns)]
    whole = torch.cat(rows, dim=1)
    whole = whole[:, : whole.shape[1] - gap, : whole.shape[2] - gap]
    return whole.permute(1, 2, 0).contiguous().numpy()


def save_grid(pictures: Tensor, path: Path, columns: int | None = None, *, enlarge: bool = True) -> None:
    """Write pictures side by side, as `grid` puts them.

    Args:
        pictures: as there.
        path: of the file; a JPEG where its name says so (that of a partial file has more behind it), else a PNG.
        columns: as there.
        enlarge: as there.
    """
    from PIL import Image

    pixels = grid(pictures, columns, enlarge=enlarge)
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(
        path, format="JPEG" if ".jpg" in path.name else "PNG", quality=JPEG_QUALITY
    )
