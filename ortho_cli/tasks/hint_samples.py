"""Samples of controllable generation: a picture in [-1, 1], its hint in [0, 1], and where its prompt stands."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ortho_cli.models.edges import canny

from .hint_data import HintSet
from .pictures import centre_box, to_tensor

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["HintSamples", "edge_picture"]

WHITE = 255.0
WHOLE = 1.0  # share of the shorter side of a picture that is seen


class HintSamples(Dataset[dict[str, Tensor]]):
    """One split, as batches of tensors; nothing about them is random, as the published trainers have it.

    Args:
        hints: the split.
        size: side of the pictures.
        hint_size: side of the hints, which their encoder makes the latents' side.
        thresholds: of canny hints that are made of the pictures.
    """

    def __init__(self, hints: HintSet, size: int, hint_size: int, thresholds: tuple[float, float]) -> None:
        self.hints = hints
        self.size = size
        self.hint_size = hint_size
        self.thresholds = thresholds

    def __len__(self) -> int:
        return len(self.hints)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        """One sample, without the batch dimension."""
        return {name: value[0] for name, value in self.fetch(key[0], torch.tensor([key[1]])).items()}

    def prompts(self, index: Tensor) -> list[str]:
        """What the pictures at some places show."""
        return [self.hints.pictures.prompt(place) for place in index.tolist()]

    def fetch(self, epoch: int, index: Tensor) -> dict[str, Tensor]:
        """A batch.

        Args:
            epoch: changes nothing.
            index: `(B,)` int64, places in the split.

        Returns:
            `image` (B, 3, S, S) float32 in [-1, 1]; `hint` (B, 3, H, H) float32 in [0, 1]; `index` as given.
        """
        pairs = [self._pair(place) for place in index.tolist()]
        images, hints = (torch.stack(column).float().div_(WHITE) for column in zip(*pairs, strict=True))
        return {"image": images.mul_(2).sub_(1), "hint": hints, "index": index}

    def _pair(self, place: int) -> tuple[Tensor, Tensor]:
        """Bytes of the picture and of its hint."""
        picture, hint = self.hints.pictures.open(place)
        image = to_tensor(picture, self.size, 3, centre_box(*picture.size, WHOLE))
        if hint is not None:
            return image, _hint_tensor(hint, self.hint_size)
        same = self.hint_size == self.size
        seen = image if same else to_tensor(picture, self.hint_size, 3, centre_box(*picture.size, WHOLE))
        return image, edge_picture(seen, self.thresholds)


def edge_picture(picture: Tensor, thresholds: tuple[float, float]) -> Tensor:
    """The canny hint of a picture: white edges on black, `(3, H, W)` uint8 of the same.

    >>> edge_picture(torch.zeros(3, 8, 8, dtype=torch.uint8), (100.0, 200.0)).any().item()
    False
    """
    edges = canny(picture.permute(1, 2, 0).contiguous().numpy(), *thresholds)
    return torch.from_numpy(edges).to(torch.uint8).mul(255).expand(3, -1, -1).contiguous()


def _hint_tensor(hint: Image, size: int) -> Tensor:
    """A hint at its size: no colour is mixed of two, since in a map of segments each is a class of its own."""
    from PIL import Image as PIL

    plain = hint.convert("RGB")
    box = centre_box(*plain.size, WHOLE)
    if plain.size != (size, size):
        plain = plain.resize((size, size), PIL.Resampling.NEAREST, box=box)
    return torch.from_numpy(np.array(plain)).permute(2, 0, 1).contiguous()
