"""MNIST as its authors pack it: idx files, a big-endian header and then bytes, gzipped or not."""

from __future__ import annotations

import gzip
import zlib
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ortho_cli.errors import RecipeError

from .image_specs import Split

__all__ = ["find_mnist", "read_idx"]

_PREFIX: dict[Split, str] = {"train": "train", "eval": "t10k"}
UINT8 = 8  # the idx code of the only type that MNIST uses
MAX_BYTES = 1_000_000_000  # a header may ask for terabytes; real sets of this kind stay below 1 GB


def find_mnist(folder: Path, split: Split) -> tuple[Path, Path] | None:
    """Pictures and labels of a split in a folder (or in torchvision's `MNIST/raw` below it); None where missing."""
    for root in (folder, folder / "MNIST" / "raw"):
        found = [
            next(
                (path for suffix in ("", ".gz") if (path := root / f"{_PREFIX[split]}-{kind}{suffix}").is_file()), None
            )
            for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
        ]
        if found[0] is not None and found[1] is not None:
            return found[0], found[1]
    return None


def read_idx(path: Path, dims: int) -> Tensor:
    """Read one idx file of bytes.

    Args:
        path: the file; gzipped where its name ends in `.gz`.
        dims: how many dimensions it must have.

    Returns:
        uint8, in the shape that the header gives.

    Raises:
        RecipeError: not such a file, cut short, or longer than its header says.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4 + 4 * dims)
            if head[:4] != bytes([0, 0, UINT8, dims]) or len(head) < 4 + 4 * dims:
                raise RecipeError(
                    f"no idx file of {dims}-dimensional bytes: it starts with {head[:4]!r}", where=str(path)
                )
            shape = [int.from_bytes(head[start : start + 4], "big") for start in range(4, len(head), 4)]
            if prod(shape) > MAX_BYTES:
                raise RecipeError(f"the header asks for {prod(shape):,} bytes", where=str(path))
            data = file.read(prod(shape) + 1)
    except (EOFError, OSError, zlib.error) as error:
        raise RecipeError(f"cannot be read: {error}", where=str(path)) from error
    if len(data) != prod(shape) or not data:
        raise RecipeError(
            f"the header asks for {prod(shape):,} bytes, the file has {'no' if not data else 'other'}", where=str(path)
        )
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(shape)
