"""dSprites as it is handed out: one `.npz`, of which the pictures alone are read; its metadata is a pickle.

The pictures are black or white, so that eight pixels fit a byte: 380 MB in place of the 3 GB that NumPy would make.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ortho_cli.errors import RecipeError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["PackedPictures", "find_sprites", "read_sprites"]

FILE = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
MEMBER = "imgs.npy"
ROWS = 4096  # pictures at a time: 16 MB


class PackedPictures:
    """Black and white pictures, a bit a pixel.

    Args:
        bits: `(N, size^2 / 8)` uint8, as `numpy.packbits` makes them.
        size: side of the pictures.
    """

    def __init__(self, bits: NDArray[np.uint8], size: int) -> None:
        self.bits = bits
        self.size = size

    def __len__(self) -> int:
        return len(self.bits)

    def open(self, place: int) -> Image:
        """The picture at a place: grey, 0 or 255."""
        from PIL import Image

        pixels = np.unpackbits(self.bits[place], count=self.size**2).reshape(self.size, self.size)
        return Image.fromarray(255 * pixels)

    def select(self, places: Sequence[int]) -> PackedPictures:
        """The pictures at some places."""
        return PackedPictures(self.bits[np.asarray(places, dtype=np.int64)], self.size)


def find_sprites(folder: Path) -> Path | None:
    """The file, in a folder or in its `dsprites`; None where it is not there."""
    return next((path for path in (folder / FILE, folder / "dsprites" / FILE) if path.is_file()), None)


def read_sprites(path: Path, size: int) -> PackedPictures:
    """Read the pictures of a dSprites file.

    Args:
        path: of the file; `imgs` must be `(N, size, size)` uint8, 0 or 1.
        size: side of the pictures.

    Raises:
        RecipeError: no such file, damaged, or of other pictures.

    Cost: one pass over the pictures, some MB of memory beside the result.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(MEMBER) as member:
            if np.lib.format.read_magic(member) != (1, 0):
                raise RecipeError(f"{MEMBER} is of a version that dSprites has not", where=str(path))
            shape, fortran, kind = np.lib.format.read_array_header_1_0(member)
            if shape[1:] != (size, size) or fortran or kind != np.uint8:
                raise RecipeError(f"{MEMBER} is {kind} {shape}, expected uint8 (N, {size}, {size})", where=str(path))
            packed = np.empty((shape[0], -(-(size**2) // 8)), dtype=np.uint8)
            for start in range(0, shape[0], ROWS):
                rows = min(ROWS, shape[0] - start)
                pixels = np.frombuffer(member.read(rows * size**2), dtype=np.uint8).reshape(rows, -1)
                if pixels.max() > 1:
                    raise RecipeError(f"{MEMBER} holds {pixels.max()}, expected 0 and 1", where=str(path))
                packed[start : start + rows] = np.packbits(pixels, axis=1)
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError, OSError) as error:
        raise RecipeError(f"no dSprites file: {str(error)[:200]}", where=str(path)) from error
    return PackedPictures(packed, size)
