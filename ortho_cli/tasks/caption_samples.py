"""Samples of captioned pictures, by (epoch, place): pictures in their shape, and what is said of them this time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .caption_buckets import Shape, bucket_shapes, nearest_shapes
from .caption_data import CaptionSet
from .draws import seed_of, uniform

if TYPE_CHECKING:
    from PIL.Image import Image

    from ortho_cli.recipe.data_captions import CaptionedPictures

__all__ = ["CaptionSamples", "cover_box", "fitted"]

PICTURE_STREAM, CAPTION_STREAM = 1, 9  # of the random numbers
SEPARATOR = ", "
WHITE = 255.0


class CaptionSamples(Dataset[dict[str, Tensor]]):
    """One split, as batches of tensors; the captions of a batch are asked for by its places.

    Args:
        found: the split.
        config: how pictures are cut and captions varied; in evaluation nothing is random.
        seed: of the run.
        training: whether this is the training split.
    """

    def __init__(self, found: CaptionSet, config: CaptionedPictures, seed: int, *, training: bool) -> None:
        self.found, self.config, self.seed, self.training = found, config, seed, training
        self.shapes = bucket_shapes(config.size, config.buckets) if config.buckets else [(config.size, config.size)]
        self.buckets = nearest_shapes([found.sizes[place] for place in found.places], self.shapes)

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        """One sample, without the batch dimension."""
        return {name: value[0] for name, value in self.fetch(key[0], torch.tensor([key[1]])).items()}

    def fetch(self, epoch: int, index: Tensor) -> dict[str, Tensor]:
        """A batch of samples of one shape.

        Returns:
            `image` (B, 3, H, W) float32 in [-1, 1]; `index` as given.
        """
        return {"image": torch.stack([self.picture(epoch, place) for place in index.tolist()]), "index": index}

    def picture(self, epoch: int, sample: int) -> Tensor:
        """A picture `(3, H, W)` in [-1, 1], cut and mirrored as it is seen in an epoch."""
        x, y, _ = self._draws(epoch, sample)
        picture = self.found.source.open(self.found.places[sample])
        pixels = fitted(picture, self.shape(sample), x, y).float().div_(WHITE).mul_(2).sub_(1)
        return pixels.flip(-1) if self.mirrored(epoch, sample) else pixels

    def shape(self, sample: int) -> Shape:
        """The shape in which a sample is seen."""
        return self.shapes[self.buckets[sample]]

    def mirrored(self, epoch: int, sample: int) -> bool:
        """Whether a sample is seen mirrored in an epoch."""
        return self.training and self.config.flip and self._draws(epoch, sample)[2] < 0.5

    def captions(self, epoch: int, index: Tensor) -> list[str]:
        """What is said of the samples at some places in an epoch."""
        if not self.training:
            return [self.found.captions[self.found.places[sample]][0] for sample in index.tolist()]
        draws = uniform(self.seed, epoch, index.numpy(), 2, CAPTION_STREAM).tolist()
        return [self._caption(epoch, sample, *own) for sample, own in zip(index.tolist(), draws, strict=True)]

    def _caption(self, epoch: int, sample: int, dropped: float, chosen: float) -> str:
        if dropped < self.config.caption_dropout:
            return ""
        captions = self.found.captions[self.found.places[sample]]
        caption = captions[int(chosen * len(captions))]
        if not self.config.caption_shuffle:
            return caption
        parts = [part.strip() for part in caption.split(SEPARATOR.strip())]
        kept, rest = parts[: self.config.caption_keep], parts[self.config.caption_keep :]
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch, sample, CAPTION_STREAM))
        return SEPARATOR.join([*kept, *(rest[at] for at in torch.randperm(len(rest), generator=generator).tolist())])

    def _draws(self, epoch: int, sample: int) -> Sequence[float]:
        """Where the cut lies along either side, and whether the picture is mirrored; the middle unless random."""
        drawn: list[float] = uniform(self.seed, epoch, np.array([sample]), 3, PICTURE_STREAM)[0].tolist()
        return drawn if self.training and self.config.crop == "random" else [0.5, 0.5, drawn[2]]


def fitted(picture: Image, shape: Shape, x: float = 0.5, y: float = 0.5) -> Tensor:
    """A picture as colour in a shape, which it covers: `(3, H, W)` uint8.

    Args:
        picture: of any mode.
        shape: width and height.
        x: where the part that is kept lies, from 0 (left) to 1 (right).
        y: from 0 (top) to 1 (bottom).
    """
    from PIL import Image as PIL

    if "transparency" in picture.info:
        picture = picture.convert("RGBA")  # what is see-through keeps the colour below it
    plain = picture.convert("RGB")
    box = cover_box(*plain.size, shape, x, y)
    plain = plain.resize(shape, PIL.Resampling.BILINEAR, box=box, reducing_gap=3.0)
    return torch.from_numpy(np.array(plain)).permute(2, 0, 1).contiguous()


def cover_box(width: int, height: int, shape: Shape, x: float, y: float) -> tuple[float, float, float, float]:
    """The largest part of a picture that has a shape's ratio: left, top, right, bottom in pixels.

    >>> cover_box(100, 50, (64, 64), 0.5, 0.5), cover_box(100, 50, (64, 64), 0.0, 0.5)
    ((25.0, 0.0, 75.0, 50.0), (0.0, 0.0, 50.0, 50.0))
    """
    scale = min(width / shape[0], height / shape[1])
    wide, high = shape[0] * scale, shape[1] * scale
    left, top = x * (width - wide), y * (height - high)
    return left, top, left + wide, top + high
