"""Pictures that stay on disk: opened by Pillow when they are asked for, cut to a square, and made a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

import numpy as np
import torch
from torch import Tensor

from ortho_cli.errors import RecipeError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["AREA_DRAWS", "PictureFiles", "Pictures", "area_box", "centre_box", "decoded", "to_tensor"]

AREA = (0.08, 1.0)  # the Inception crop: share of the picture, and width over height
RATIO = (3 / 4, 4 / 3)
TRIES = 10
AREA_DRAWS = 4 * TRIES

Box = tuple[float, float, float, float]


class Pictures(Protocol):
    """A list of pictures that are opened one at a time."""

    def __len__(self) -> int: ...

    def open(self, place: int) -> Image:
        """The picture at a place, decoded."""

    def select(self, places: Sequence[int]) -> Pictures:
        """The pictures at some places, in their order."""


class PictureFiles:
    """Picture files below one folder.

    Args:
        root: the folder.
        names: the files, relative to it.
    """

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self.root = root
        self.names = list(names)

    def __len__(self) -> int:
        return len(self.names)

    def open(self, place: int) -> Image:
        """Open and decode a file.

        Raises:
            UsageError: Pillow is not installed.
            RecipeError: no picture, or cut short.
        """
        path = self.root / self.names[place]
        return decoded(path, str(path))

    def select(self, places: Sequence[int]) -> PictureFiles:
        """The files at some places."""
        return PictureFiles(self.root, [self.names[place] for place in places])


def decoded(file: Path | BinaryIO, where: str) -> Image:
    """Open and decode a picture.

    Args:
        file: a path, or what is to be read.
        where: what to call it.

    Raises:
        UsageError: Pillow is not installed.
        RecipeError: no picture, or cut short.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise UsageError("pictures on disk need Pillow", hint="pip install 'ortho-cli[vision]'") from error
    try:
        picture = Image.open(file)
        with picture:
            picture.load()
        return picture
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:  # a broken PNG chunk
        raise RecipeError(f"no picture that Pillow can read: {str(error)[:200]}", where=where) from error


def to_tensor(picture: Image, size: int, channels: int, box: Box | None = None) -> Tensor:
    """Decode a picture, cut a box out of it, and resize that to a square.

    Args:
        picture: of any mode; made grey or colour first (paletted, CMYK and 16-bit pictures exist in most large sets).
        size: side of the result.
        channels: 1 for grey, 3 for colour.
        box: left, top, right, bottom in pixels; None: the whole picture.

    Returns:
        `(channels, size, size)` uint8.
    """
    from PIL import Image

    if "transparency" in picture.info:
        picture = picture.convert("RGBA")  # what is see-through keeps the colour below it, as in every other mode
    plain = picture.convert("L" if channels == 1 else "RGB")
    if plain.size != (size, size) or box is not None:
        plain = plain.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=3.0)
    pixels = torch.from_numpy(np.array(plain))
    return pixels.view(size, size, channels).permute(2, 0, 1).contiguous()


def centre_box(width: int, height: int, share: float) -> Box:
    """The middle square of a picture; `share` is its side over the shorter one of the picture.

    >>> centre_box(256, 512, 0.875)
    (16.0, 144.0, 240.0, 368.0)
    """
    side = share * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def area_box(width: int, height: int, draws: Sequence[float]) -> Box:
    """A box of random area and shape at a random place in a picture.

    Ten tries of an area of 8 to 100 % and a ratio of 3:4 to 4:3; if none fits, the largest middle box of such a ratio.

    Args:
        width: of the picture.
        height: of the picture.
        draws: `AREA_DRAWS` numbers in [0, 1).

    Reference: Szegedy et al. 2014, arXiv:1409.4842, section 6.

    >>> area_box(100, 100, [1.0, 0.5, 0.0, 0.0] * 10)
    (0.0, 0.0, 100.0, 100.0)
    """
    for area, ratio, x, y in zip(*(iter(draws),) * 4, strict=True):
        share = AREA[0] + (AREA[1] - AREA[0]) * area
        shape = exp(log(RATIO[0]) + (log(RATIO[1]) - log(RATIO[0])) * ratio)
        wide, high = sqrt(share * width * height * shape), sqrt(share * width * height / shape)
        if wide <= width and high <= height:
            left, top = x * (width - wide), y * (height - high)
            return left, top, left + wide, top + high
    wide, high = min(width, height * RATIO[1]), min(height, width / RATIO[0])
    return (width - wide) / 2, (height - high) / 2, (width + wide) / 2, (height + high) / 2
