"""What sees landmarks and segments in pictures: face-alignment, and a SegFormer of the hub. Loaded when first used."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ortho_cli.errors import UsageError

from .evaluation import Missing

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["LANDMARKS", "SEGFORMER", "FaceLandmarks", "Segmenter", "read_labels", "read_landmarks"]

LANDMARKS = 68
SEGFORMER = "nvidia/segformer-b4-finetuned-ade-512-512"  # ADE20K's 150 classes, as in OFT's and HRA's tables
UNLABELLED = 0  # of ADE20K's annotations, whose classes are numbered from 1

Points = NDArray[np.float64]


class FaceLandmarks:
    """Find the 68 landmarks of the face in a picture, by face-alignment (Bulat and Tzimiropoulos 2017).

    Args:
        device: torch's name of one.

    Raises:
        Missing: it is not installed, or its weights cannot be fetched.
    """

    def __init__(self, device: str = "cpu") -> None:
        try:
            face_alignment: Any = importlib.import_module("face_alignment")
        except ImportError as error:
            raise Missing("face-alignment is not installed", "pip install face-alignment") from error
        kinds: Any = face_alignment.LandmarksType
        two_d = kinds.TWO_D if hasattr(kinds, "TWO_D") else kinds._2D  # its name before 1.4
        try:
            self.network: Any = face_alignment.FaceAlignment(two_d, device=device, flip_input=False)
        except OSError as error:  # its weights come from the authors' site, once
            raise Missing(f"face-alignment cannot fetch its weights: {str(error)[:200]}") from error

    def __call__(self, picture: Image) -> Points | None:
        """`(68, 2)` in pixels of the face that is surest; None where there is none."""
        faces = self.network.get_landmarks(np.asarray(picture.convert("RGB")))
        return np.asarray(faces[0], dtype=np.float64)[:, :2] if faces else None


class Segmenter:
    """Label every pixel of a picture, by a SegFormer of transformers.

    Args:
        source: a folder or hub id.
        device: torch's name of one.

    Raises:
        Missing: transformers is not installed, or the model is not there.
    """

    def __init__(self, source: str = SEGFORMER, device: str = "cpu") -> None:
        try:
            transformers: Any = importlib.import_module("transformers")
        except ImportError as error:
            raise Missing("transformers is not installed", "pip install 'ortho-cli[diffusion]'") from error
        try:
            self.processor: Any = transformers.AutoImageProcessor.from_pretrained(source)
            model: Any = transformers.SegformerForSemanticSegmentation.from_pretrained(source)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0][:200]
            raise Missing(f"the SegFormer {source!r} does not open: {reason}", f"hf download {source}") from error
        self.model = model.to(device).eval()
        self.classes = int(model.config.num_labels)

    def __call__(self, picture: Image) -> NDArray[np.int64]:
        """`(H, W)`, the class of each pixel."""
        import torch

        given = self.processor(images=picture.convert("RGB"), return_tensors="pt").to(self.model.device)
        with torch.no_grad():
            found = self.model(**given)
        size = [(picture.height, picture.width)]
        labels: NDArray[np.int64] = self.processor.post_process_semantic_segmentation(found, size)[0].cpu().numpy()
        return labels


def read_labels(picture: Image) -> NDArray[np.int64]:
    """The classes that an annotation in ADE20K's form holds, from 0, and 255 where nothing is labelled.

    Args:
        picture: of one channel: 0 for nothing, else the class plus 1.

    >>> from PIL import Image
    >>> read_labels(Image.fromarray(np.array([[0, 1, 150]], np.uint8))).tolist()
    [[255, 0, 149]]
    """
    values = np.asarray(picture).astype(np.int64)
    return np.where(values == UNLABELLED, 255, values - 1)


def read_landmarks(path: Path, scale: float = 1.0) -> Points:
    """Landmarks of a text file, a point a line, as the CelebA-HQ control data has them.

    Args:
        path: of the file.
        scale: its pixels in pixels of the picture; 0.5 for that data, whose points are of 1024 pixels, at 512.

    Returns:
        `(68, 2)`.

    Raises:
        UsageError: not 68 points.
    """
    try:
        points = np.loadtxt(path, dtype=np.float64, ndmin=2)
    except (OSError, ValueError) as error:
        raise UsageError(f"no landmarks: {str(error)[:120]}", where=str(path)) from error
    if points.shape != (LANDMARKS, 2) or not np.isfinite(points).all():
        raise UsageError(f"{points.shape[0]} points of {points.shape[1]} numbers, expected 68 of 2", where=str(path))
    return points * scale
