"""Pictures one after the other in one file: a film, by imageio."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ortho_cli.errors import UsageError, check_choice

__all__ = ["KINDS", "check_video", "save_video"]

KINDS = {"mp4": "imageio_ffmpeg", "gif": "imageio"}  # and what must be installed for each
RATE = 24  # pictures a second


def check_video(kind: str) -> None:
    """See that films of a kind can be made here, before anything is drawn.

    Raises:
        UsageError: no such kind, or its library is not installed.
    """
    check_choice("--video", kind, tuple(KINDS))
    if any(importlib.util.find_spec(name) is None for name in ("imageio", KINDS[kind])):
        raise UsageError(f"--video {kind} needs imageio", hint="pip install 'imageio[ffmpeg]'")


def save_video(pictures: Sequence[NDArray[np.uint8]], path: Path, kind: str) -> None:
    """Write a film.

    Args:
        pictures: `(height, width, 1 or 3)` each, all of one size; a white edge makes that even where it is odd.
        path: of the file, whatever its name.
        kind: a key of `KINDS`.
    """
    import imageio.v3 as imageio

    high, wide = (side % 2 for side in pictures[0].shape[:2])
    frames = np.stack([np.pad(each, ((0, high), (0, wide), (0, 0)), constant_values=255) for each in pictures])
    frames = np.broadcast_to(frames, (*frames.shape[:3], 3))
    settings: dict[str, Any] = (
        {"plugin": "pillow", "duration": 1000 / RATE, "loop": 0}
        if kind == "gif"
        else {"plugin": "FFMPEG", "fps": RATE, "codec": "libx264", "macro_block_size": 2}
    )
    path.write_bytes(imageio.imwrite("<bytes>", frames, extension=f".{kind}", **settings))
