"""Samples of a picture set, by (epoch, place): augmented and normalised tensors, the same wherever they are made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from .augment import Augmentation
from .draws import uniform
from .image_set import ImageSet
from .image_specs import ImageSpec
from .pictures import AREA_DRAWS, Pictures, area_box, centre_box, to_tensor

__all__ = ["ImageSamples"]

AREA_STREAM = 1  # of the random numbers; 0 is the augmentations'


class ImageSamples(Dataset[dict[str, Tensor]]):
    """One split, as batches of tensors.

    Pictures on disk of no common size are cut to squares as they are opened: to a random part where `crop` is among
    the augmentations, else to the middle. All others are resized whole, and `crop` is the padded one.

    Args:
        images: the split.
        spec: of the set.
        size: side of the pictures that the model gets.
        augment: names of the augmentations, none for evaluation.
        seed: of the run.
    """

    def __init__(self, images: ImageSet, spec: ImageSpec, size: int, augment: Sequence[str], seed: int) -> None:
        self.images = images
        self.spec = spec
        self.size = size
        self.seed = seed
        self.random_area = not spec.sized and "crop" in augment
        names = [name for name in augment if spec.sized or name != "crop"]
        self.augmentation = Augmentation(names, seed, size, spec.mean)
        mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
        self._factor, self._offset = (1 / std)[:, None, None], (-mean / std)[:, None, None]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        """One sample, without the batch dimension."""
        epoch, place = key
        return {name: value[0] for name, value in self.fetch(epoch, torch.tensor([place])).items()}

    def fetch(self, epoch: int, index: Tensor) -> dict[str, Tensor]:
        """A batch.

        Args:
            epoch: decides the augmentations, with the seed and the places.
            index: `(B,)` int64, places in the split.

        Returns:
            `image` (B, C, size, size) float32, normalised; `label` (B,) int64; `index` as given.
        """
        stored = self.images.images
        raw = stored.index_select(0, index) if isinstance(stored, Tensor) else self._open(stored, epoch, index)
        values = raw.to(torch.float32).mul_(1 / self.images.white)
        if values.shape[-1] != self.size:
            side = (self.size, self.size)
            values = F.interpolate(values, side, mode="bilinear", align_corners=False, antialias=True)
        values = self.augmentation(values, epoch, index).mul_(self._factor).add_(self._offset)
        return {"image": values, "label": self.images.labels[index], "index": index}

    def _open(self, pictures: Pictures, epoch: int, index: Tensor) -> Tensor:
        draws = uniform(self.seed, epoch, index.numpy(), AREA_DRAWS, AREA_STREAM) if self.random_area else None
        opened = []
        for row, place in enumerate(index.tolist()):
            picture = pictures.open(place)
            box = None
            if draws is not None:
                box = area_box(*picture.size, draws[row].tolist())
            elif not self.spec.sized:
                box = centre_box(*picture.size, self.spec.share)
            opened.append(to_tensor(picture, self.size, self.spec.channels, box))
        return torch.stack(opened)
