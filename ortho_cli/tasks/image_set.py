"""What one split of a picture set is, wherever it came from; and how a set without an evaluation split gets one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .draws import uniform
from .image_specs import Split
from .pictures import Pictures

__all__ = ["BYTE_WHITE", "ImageSet", "stratified", "unlabelled"]

BYTE_WHITE = 255.0
# Of sets that come without an evaluation split; drawn with a seed of its own, so that all runs are judged alike.
EVAL_SHARE = 0.2
SPLIT_SEED = 0


@dataclass(frozen=True)
class ImageSet:
    """One split: pictures (`(N, C, H, W)` bytes, or to be opened), class numbers, and the names of all classes.

    Pictures that nobody sorted are all of one class.
    """

    images: Tensor | Pictures
    labels: Tensor
    classes: tuple[str, ...]
    white: float = BYTE_WHITE

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, places: Sequence[int]) -> ImageSet:
        """The samples at some places."""
        at = torch.tensor(places, dtype=torch.long)
        images = self.images[at] if isinstance(self.images, Tensor) else self.images.select(places)
        return replace(self, images=images, labels=self.labels[at])

    def held_out(self, split: Split) -> ImageSet:
        """One split of a set that has none."""
        return self.select(stratified(self.labels.tolist(), split))


def unlabelled(images: Tensor | Pictures, name: str) -> ImageSet:
    """Pictures without classes: all of one, that of the set's name.

    >>> unlabelled(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), "faces").labels.tolist()
    [0, 0]
    """
    return ImageSet(images, torch.zeros(len(images), dtype=torch.long), (name,))


def stratified(labels: Sequence[int], split: Split) -> list[int]:
    """The places of one split of a set that has none: of every class one sample in five is for evaluation.

    Which ones is a hash of the place, the same in every run; a class of two or more samples has at least one.

    >>> stratified([0] * 5 + [1] * 5, "eval") == sorted(set(range(10)) - set(stratified([0] * 5 + [1] * 5, "train")))
    True
    """
    values = np.asarray(labels)
    draws = uniform(SPLIT_SEED, 0, np.arange(len(values)), 1)[:, 0]
    held: set[int] = set()
    for label in np.unique(values):
        places = np.flatnonzero(values == label)
        count = max(round(EVAL_SHARE * len(places)), 1) if len(places) > 1 else 0
        held.update(places[np.argsort(draws[places])[:count]].tolist())
    return [place for place in range(len(values)) if (place in held) == (split == "eval")]
