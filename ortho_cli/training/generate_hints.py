"""The hints that pictures are drawn to, as a batch for the hint encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ortho_cli.errors import UsageError
from ortho_cli.models.edges import canny
from ortho_cli.models.hint_encoder import STRIDE

from .generate_pictures import Prompt

__all__ = ["hint_batch"]


def hint_batch(prompts: Sequence[Prompt], kind: str | None, model: Any, width: int, height: int) -> Tensor:
    """The hints of some prompts, as the hint encoder takes them.

    Args:
        prompts: each with a hint.
        kind: of hint; of a picture that is no drawing of edges, `canny` is found here.
        model: for how many pixels there is one latent.
        width: of the pictures to draw, in pixels.
        height: likewise.

    Returns:
        `(B, 3, 8h, 8w)` in [0, 1], `h` and `w` those of the latents.

    Raises:
        UsageError: a prompt without a hint, or a file that is no picture.
    """
    size = width // model.latent_factor * STRIDE, height // model.latent_factor * STRIDE
    return torch.stack([_hint(prompt, kind, size) for prompt in prompts])


def _hint(prompt: Prompt, kind: str | None, size: tuple[int, int]) -> Tensor:
    if prompt.hint is None:
        raise UsageError(f"the prompt {prompt.text[:80]!r} has no hint, and others have", hint="give each one, or none")
    from PIL import Image

    picture = _picture(prompt.hint)
    if kind == "canny" and not _is_edges(picture):
        pixels = np.asarray(picture.resize(size, Image.Resampling.LANCZOS))
        edges = torch.from_numpy(canny(pixels)).float()
        return edges.expand(3, -1, -1)
    flat = kind in ("segm", "canny")  # colours that mean something have none between them
    resized = picture.resize(size, Image.Resampling.NEAREST if flat else Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255


def _picture(path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path.expanduser()) as picture:
            return picture.convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise UsageError(f"--control {path} is no picture that can be read: {str(error)[:200]}") from error


def _is_edges(picture: Any) -> bool:
    """Whether a picture is white lines on black already."""
    values = np.unique(np.asarray(picture))
    return bool(np.isin(values, (0, 255)).all())
