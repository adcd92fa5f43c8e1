"""Picture sets that come with a library: nothing is fetched."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ortho_cli.errors import UsageError

from .image_set import ImageSet, unlabelled
from .image_specs import Split

__all__ = ["BUNDLED"]

DIGITS_WHITE = 16.0
FACES = 100  # of the 200 pictures; the others show none


def _digits(split: Split) -> ImageSet:
    """8x8 digits of scikit-learn."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images.astype("uint8")).unsqueeze(1)
    labels = torch.from_numpy(digits.target.astype("int64"))
    return ImageSet(images, labels, tuple(str(name) for name in digits.target_names), DIGITS_WHITE).held_out(split)


def _faces(split: Split) -> ImageSet:
    """25x25 faces of scikit-image, cut from Labeled Faces in the Wild.

    Raises:
        UsageError: scikit-image is not installed.
    """
    try:
        from skimage import data
    except ImportError as error:
        raise UsageError("data faces comes with scikit-image", hint="pip install scikit-image") from error
    pictures: NDArray[np.float64] = data.lfw_subset()  # type: ignore[no-untyped-call]
    images = torch.from_numpy((255 * pictures[:FACES]).round().astype("uint8")).unsqueeze(1)
    return unlabelled(images, "faces").held_out(split)


BUNDLED = {"digits": _digits, "faces": _faces}
