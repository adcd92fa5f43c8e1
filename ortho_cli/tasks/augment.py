"""Random changes to training pictures, drawn from (seed, epoch, sample) and done on the whole batch at once.

`Augmentation` carries out what a recipe's `data.augment` lists, in that order, on values in [0, 1]. The functions below
it take their random numbers as arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ortho_cli.errors import UsageError

from .draws import seed_of, uniform

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Augmentation", "cut_out", "mirror", "rand_augment", "shift"]

PAD_SHARE = 8  # the padding of a crop is this part of the side: He et al.'s 4 pixels at 32, 1 at 8
CUTOUT_SHARE = 2  # the square's side: DeVries and Taylor's 16 pixels at 32
MIRRORED_SHARE = 0.5
COLOURS = 3
RAND_AUGMENT_DEPTH, RAND_AUGMENT_MAGNITUDE = 2, 10  # operations a picture, of 30: the usual pair
# Which random number of a sample decides what, so that adding an augmentation leaves the others as they were.
_TOP, _LEFT, _MIRROR, _HOLE_ROW, _HOLE_COLUMN, _COLUMNS = range(6)


class Augmentation:
    """The augmentations of a recipe, for one set of pictures.

    Args:
        names: of `crop`, `flip`, `cutout`, `randaugment`; applied in this order.
        seed: of the run.
        size: side of the pictures.
        mean: of each channel, what a cutout leaves behind.

    Raises:
        UsageError: `randaugment` without kornia.
    """

    def __init__(self, names: Sequence[str], seed: int, size: int, mean: Sequence[float]) -> None:
        self.names = tuple(names)
        self.seed = seed
        self.pad = max(1, size // PAD_SHARE)
        self.hole = size // CUTOUT_SHARE
        self.mean = torch.tensor(mean)
        if "randaugment" in self.names:
            _operations()

    def __call__(self, images: Tensor, epoch: int, index: Tensor) -> Tensor:
        """Change pictures `(B, C, H, W)` of values in [0, 1] as their places `index` `(B,)` have it in this epoch."""
        if not self.names:
            return images
        draws = uniform(self.seed, epoch, index.numpy(), _COLUMNS)
        for name in self.names:
            if name == "crop":
                down, right = _integers(draws[:, [_TOP, _LEFT]], 2 * self.pad + 1)
                images = shift(images, (down - self.pad).tolist(), (right - self.pad).tolist())
            elif name == "flip":
                images = mirror(images, torch.from_numpy(draws[:, _MIRROR] < MIRRORED_SHARE))
            elif name == "cutout":
                row, column = _integers(draws[:, [_HOLE_ROW, _HOLE_COLUMN]], images.shape[-1])
                images = cut_out(images, torch.from_numpy(row), torch.from_numpy(column), self.hole, self.mean)
            else:
                images = rand_augment(images, [seed_of(self.seed, epoch, place) for place in index.tolist()])
        return images


def shift(images: Tensor, down: Sequence[int], right: Sequence[int]) -> Tensor:
    """Look at each picture through a window that was moved; outside is black.

    The same as padding by zeros and cropping at `pad + down`, `pad + right`, without the padded copy.

    Args:
        images: `(B, C, H, W)`, any dtype, on the CPU.
        down: how far each window moves down, by less than the picture's height.
        right: how far it moves to the right, by less than its width.

    Cost: one copy of the batch, and some 2 microseconds a picture.

    >>> shift(torch.tensor([[[[1, 2], [3, 4]]]]), [1], [0]).tolist()
    [[[[3, 4], [0, 0]]]]
    """
    moved = torch.zeros_like(images)
    source, target = images.numpy(), moved.numpy()
    height, width = images.shape[-2:]
    for place, (y, x) in enumerate(zip(down, right, strict=True)):
        target[place, :, max(-y, 0) : height + min(-y, 0), max(-x, 0) : width + min(-x, 0)] = source[
            place, :, max(y, 0) : height + min(y, 0), max(x, 0) : width + min(x, 0)
        ]
    return moved


def mirror(images: Tensor, which: Tensor) -> Tensor:
    """Swap left and right of the pictures for which `which` `(B,)` is true.

    >>> mirror(torch.tensor([[[[1, 2]]], [[[3, 4]]]]), torch.tensor([True, False])).tolist()
    [[[[2, 1]]], [[[3, 4]]]]
    """
    return torch.where(which[:, None, None, None], images.flip(-1), images)


def cut_out(images: Tensor, row: Tensor, column: Tensor, side: int, fill: Tensor) -> Tensor:
    """Cover a square of each picture; it may reach over the border.

    Args:
        images: `(B, C, H, W)`.
        row: `(B,)` of the squares' centres.
        column: `(B,)` of the squares' centres.
        side: of the square.
        fill: `(C,)` what to cover it with; the mean of a channel is zero once normalised.

    Reference: DeVries and Taylor 2017, arXiv:1708.04552.

    >>> cut_out(torch.ones(1, 1, 3, 3), torch.tensor([0]), torch.tensor([1]), 2, torch.zeros(1)).tolist()
    [[[[0.0, 0.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]]]
    """
    height, width = images.shape[-2:]
    down = torch.arange(height) - (row[:, None] - side // 2)
    right = torch.arange(width) - (column[:, None] - side // 2)
    hole = ((down >= 0) & (down < side))[:, None, :, None] & ((right >= 0) & (right < side))[:, None, None, :]
    return torch.where(hole, fill[:, None, None], images)


def rand_augment(images: Tensor, seeds: Sequence[int]) -> Tensor:
    """Apply two random operations of RandAugment to each picture, chosen by its own seed.

    kornia draws from torch's global generator, so each picture is done alone with that generator seeded, and the
    generator is put back.

    Args:
        images: `(B, C, H, W)`, float, values in [0, 1]; C is 3, or 1 for grey, which stays grey.
        seeds: one a picture.

    Raises:
        UsageError: kornia is not installed.

    Reference: Cubuk et al. 2020, arXiv:1909.13719.
    """
    operations = _operations()
    done = []
    with torch.random.fork_rng(devices=[]):
        for image, seed in zip(images, seeds, strict=True):
            torch.manual_seed(seed)
            colour = image if len(image) == COLOURS else image[:1].expand(COLOURS, -1, -1)
            done.append(operations(colour[None])[:, : len(image)])
    return torch.cat(done)


def _integers(draws: NDArray[np.float64], below: int) -> NDArray[np.int64]:
    """Uniform whole numbers from uniform draws, `(B, k)` to `(k, B)`."""
    whole: NDArray[np.int64] = (draws * below).astype("int64").T
    return whole


@cache
def _operations() -> torch.nn.Module:
    try:
        from kornia.augmentation.auto import RandAugment
    except ImportError as error:
        raise UsageError(
            "data.augment randaugment needs kornia",
            hint="pip install 'ortho-cli[vision]', or take crop, flip and cutout, which need nothing",
        ) from error
    made: torch.nn.Module = RandAugment(n=RAND_AUGMENT_DEPTH, m=RAND_AUGMENT_MAGNITUDE)
    return made
