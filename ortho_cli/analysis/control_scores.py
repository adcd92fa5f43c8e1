"""Pictures drawn to a hint against the pictures that the hints are from: edges, landmarks of faces, segments.

Each is a function of `registry.TABLES["picture_metrics"]`; what they compute is in `control_metrics.py`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ortho_cli.errors import UsageError
from ortho_cli.models.edges import HIGH, LOW, canny

from .control_detectors import SEGFORMER, FaceLandmarks, Segmenter, read_labels, read_landmarks
from .control_metrics import confusion_counts, edge_overlap, landmark_distances, landmark_summary, segment_scores
from .evaluation import Missing, Skipped
from .picture_folder import PictureFolder, paired
from .picture_metrics import PictureOptions

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["edges_of_folders", "landmarks_of_folders", "segments_of_folders"]

LABEL_MODES = ("L", "I", "I;16", "P")  # of one channel: an annotation, not a picture


def edges_of_folders(
    generated: PictureFolder,
    reference: PictureFolder,
    options: PictureOptions,
    *,
    low: float = LOW,
    high: float = HIGH,
) -> dict[str, float]:
    """Compare canny edges of each generated picture with those of its reference; means over pictures.

    Raises:
        Missing: OpenCV is not installed, or a picture has no reference of its size.
    """
    if importlib.util.find_spec("cv2") is None:
        raise Missing("OpenCV is not installed", "pip install 'ortho-cli[eval]'")
    found = []
    for mine, other in _pairs(generated, reference):
        drawn, wanted = (np.asarray(picture) for picture in (generated.open(mine), reference.open(other)))
        _same_size(generated.root / mine, drawn.shape, wanted.shape)
        found.append(edge_overlap(canny(drawn, low, high), canny(wanted, low, high)))
    iou, f1 = np.mean(found, axis=0)
    return {"canny_iou": float(iou), "canny_f1": float(f1)}


def landmarks_of_folders(
    generated: PictureFolder, reference: PictureFolder, options: PictureOptions, *, side: int = 1024
) -> dict[str, float] | Skipped:
    """Measure how far the landmarks of generated faces are from where they should be.

    Where they should be stands in `<name>.txt` beside a reference, in pixels of a picture of `side`; without such a
    file it is found in the reference. A reference in which no face is found asks for nothing, and is left out.

    Raises:
        UsageError: a file that holds no landmarks.
        Missing: face-alignment is not installed, or a picture has no reference.
    """
    pairs = _pairs(generated, reference)
    detect = FaceLandmarks(str(options.device))
    drawn, wanted, sides = [], [], []
    for mine, other in pairs:
        picture = generated.open(mine)
        listed = (reference.root / other).with_suffix(".txt")
        if listed.is_file():
            target = read_landmarks(listed, picture.width / side)
        else:
            original = reference.open(other)
            seen = detect(original)
            if seen is None:
                continue
            target = seen * (picture.width / original.width)
        drawn.append(detect(picture))
        wanted.append(target)
        sides.append(picture.width)
    options.say(f"landmarks: faces in {len(wanted):,} of the references")
    if not wanted:
        return Skipped("landmarks", "no face is found in any reference")
    return landmark_summary(landmark_distances(drawn, wanted), float(np.mean(sides)))


def segments_of_folders(
    generated: PictureFolder, reference: PictureFolder, options: PictureOptions, *, model: str = SEGFORMER
) -> dict[str, float] | Skipped:
    """Segment generated pictures, and compare with annotations or, where references are colour, with their segments.

    Raises:
        Missing: the SegFormer is not there, or a picture has no reference of its size.
    """
    pairs = _pairs(generated, reference)
    segment = Segmenter(model, str(options.device))
    counts: NDArray[np.int64] = np.zeros((segment.classes, segment.classes), np.int64)
    for mine, other in pairs:
        drawn, original = segment(generated.open(mine)), _as_it_is(reference.root / other)
        wanted = read_labels(original) if original.mode in LABEL_MODES else segment(original)
        _same_size(generated.root / mine, drawn.shape, wanted.shape)
        counts += confusion_counts(drawn, wanted, segment.classes)
    if not counts.any():
        return Skipped("segments", "no pixel of the references has a label")
    return segment_scores(counts)


def _pairs(generated: PictureFolder, reference: PictureFolder) -> list[tuple[str, str]]:
    """Which reference belongs to each picture; folders that do not belong together have no such scores."""
    try:
        return paired(generated, reference)
    except UsageError as error:
        raise Missing(error.message, error.hint) from error


def _as_it_is(path: Path) -> Image:
    """A reference with the channels that it is stored with."""
    from PIL import Image as PIL

    with PIL.open(path) as picture:
        picture.load()
    found: Image = picture
    return found


def _same_size(path: Path, drawn: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if drawn[:2] != wanted[:2]:
        raise Missing(
            f"{path} is {drawn[1]} x {drawn[0]} pixels, its reference {wanted[1]} x {wanted[0]}",
            "generate at the references' size, or resize these",
        )
