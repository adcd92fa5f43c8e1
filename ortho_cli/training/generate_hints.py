"""The hints that pictures are drawn to: files, or those of a run's own data; seen as they are in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ortho_cli.errors import UsageError
from ortho_cli.models.edges import HIGH, LOW
from ortho_cli.models.hint_encoder import STRIDE
from ortho_cli.tasks.hint_samples import edge_picture

if TYPE_CHECKING:
    from PIL.Image import Image

    from ortho_cli.tasks.hint_data import HintPictures

__all__ = ["DataHint", "FileHint", "Hint", "HintKind", "hint_batch", "middle"]


class Hint(Protocol):
    """Something that can be drawn to."""

    @property
    def name(self) -> str:
        """What the manifest calls it."""

    def open(self) -> tuple[Image, Image | None]:
        """A picture and its hint; None where the hint is to be made of the picture."""


@dataclass(frozen=True)
class FileHint:
    """A picture file that is a hint; for canny hints it may be a photograph, whose edges are found."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def open(self) -> tuple[Image, Image | None]:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(self.path.expanduser()) as opened:
                picture = opened.convert("RGB")
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            raise UsageError(f"--control {self.path} is no picture that can be read: {str(error)[:200]}") from error
        black_and_white = bool(np.isin(np.unique(np.asarray(picture)), (0, 255)).all())
        return picture, picture if black_and_white else None


@dataclass(frozen=True)
class DataHint:
    """A sample of a run's data."""

    pictures: HintPictures = field(compare=False)
    split: str
    place: int

    @property
    def name(self) -> str:
        return f"{self.split} {self.place}"

    def open(self) -> tuple[Image, Image | None]:
        return self.pictures.open(self.place)


@dataclass(frozen=True)
class HintKind:
    """What hints show, and at which gradients edges are found."""

    name: str | None = None
    thresholds: tuple[float, float] = (LOW, HIGH)


def hint_batch(hints: Sequence[Hint | None], kind: HintKind, model: Any, width: int, height: int) -> Tensor:
    """Some hints as the hint encoder takes them.

    Args:
        hints: one for each picture.
        kind: of all of them.
        model: for how many pixels there is one latent.
        width: of the pictures to draw, in pixels.
        height: likewise.

    Returns:
        `(B, 3, 8h, 8w)` in [0, 1], `h` and `w` those of the latents.

    Raises:
        UsageError: a picture without a hint, or a file that is no picture.
    """
    size = width // model.latent_factor * STRIDE, height // model.latent_factor * STRIDE
    return torch.stack([_tensor(hint, kind, size) for hint in hints])


def middle(picture: Image, size: tuple[int, int], *, exact: bool = False) -> Image:
    """The middle of a picture in the shape of `size`, and of that size; `exact`: no colour is mixed of two."""
    from PIL import Image as PIL

    plain = picture.convert("RGB")
    scale = min(plain.width / size[0], plain.height / size[1])
    left, top = (plain.width - scale * size[0]) / 2, (plain.height - scale * size[1]) / 2
    box = (left, top, left + scale * size[0], top + scale * size[1])
    if exact:
        return plain.resize(size, PIL.Resampling.NEAREST, box=box) if plain.size != size else plain
    return plain.resize(size, PIL.Resampling.BILINEAR, box=box, reducing_gap=3.0)


def _tensor(hint: Hint | None, kind: HintKind, size: tuple[int, int]) -> Tensor:
    if hint is None:
        raise UsageError("some prompts have a hint and others none", hint="give each one, or none")
    picture, drawn = hint.open()
    if drawn is None and kind.name == "canny":
        return edge_picture(_bytes(middle(picture, size)), kind.thresholds).float() / 255
    return _bytes(middle(drawn or picture, size, exact=True)).float() / 255


def _bytes(picture: Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
