"""How well pictures keep to the hints they were drawn from: edges, landmarks of faces, segments; on plain arrays.

What makes edges, landmarks and segments of a picture is `control_detectors.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["confusion_counts", "edge_overlap", "landmark_distances", "landmark_summary", "segment_scores"]

Points = NDArray[np.float64]
IGNORED = 255  # the label of pixels that nobody labelled


def edge_overlap(drawn: NDArray[np.bool_], wanted: NDArray[np.bool_]) -> tuple[float, float]:
    """Compare two maps of edges: intersection over union, and F1 (the harmonic mean of precision and recall).

    Two empty maps agree, so both are 1; the published script divides zero by zero there, and its mean is then no
    number. Where one map alone is empty both are 0, in the script too.

    Args:
        drawn: `(H, W)` edges of the picture that was made.
        wanted: `(H, W)` edges of the picture that the hint is from.

    >>> edge_overlap(np.array([[True, True, False]]), np.array([[False, True, True]]))
    (0.3333333333333333, 0.5)
    >>> edge_overlap(np.zeros((2, 2), bool), np.zeros((2, 2), bool))
    (1.0, 1.0)
    """
    both, either = int((drawn & wanted).sum()), int((drawn | wanted).sum())
    if not either:
        return 1.0, 1.0
    return both / either, 2 * both / (both + either)


def landmark_distances(drawn: Sequence[Points | None], wanted: Sequence[Points]) -> list[float | None]:
    """Average for each picture the distance of its landmarks from where they should be, in pixels.

    Args:
        drawn: `(68, 2)` of each picture, in its pixels; None where no face was found.
        wanted: `(68, 2)` of each, in the same pixels.

    Returns:
        A distance a picture; None where there was no face.
    """
    return [
        None if mine is None else float(np.linalg.norm(mine - target, axis=1).mean())
        for mine, target in zip(drawn, wanted, strict=True)
    ]


def landmark_summary(distances: Sequence[float | None], side: float) -> dict[str, float]:
    """Sum up the landmark distances of some pictures, those without a face among them.

    Args:
        distances: of `landmark_distances`.
        side: of the pictures, in pixels: what a picture without a face counts as being off.

    Returns:
        `landmark_distance`, over all pictures; `landmark_failures`, the share without a face; and, where there is any
        face, `landmark_distance_detected`, the published form: over pictures with a face alone, so that a model which
        draws fewer faces is not judged worse.

    >>> landmark_summary([6.0, None], 512.0)
    {'landmark_distance': 259.0, 'landmark_failures': 0.5, 'landmark_distance_detected': 6.0}
    """
    found = [value for value in distances if value is not None]
    summary = {
        "landmark_distance": float(np.mean([side if value is None else value for value in distances])),
        "landmark_failures": 1 - len(found) / len(distances),
    }
    return summary | ({"landmark_distance_detected": float(np.mean(found))} if found else {})


def confusion_counts(drawn: NDArray[np.int64], wanted: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Count the pixels of each wanted class (row) by the class they were drawn as (column).

    Args:
        drawn: labels of any shape, 0 to ``classes - 1``.
        wanted: labels of the same shape; other numbers (255) are pixels that do not count.
        classes: number of classes.

    Returns:
        `(classes, classes)`; those of several pictures add up.

    >>> confusion_counts(np.array([0, 1, 1, 0]), np.array([0, 1, 0, 255]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    known = (wanted >= 0) & (wanted < classes)
    pairs = classes * wanted[known].astype(np.int64) + drawn[known]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def segment_scores(counts: NDArray[np.int64]) -> dict[str, float]:
    """Score segments as semantic segmentation is: over all pixels of all pictures together.

    Args:
        counts: `(C, C)`, the sum of `confusion_counts`.

    Returns:
        `mean_iou`: intersection over union, averaged over classes that were wanted or drawn; `mean_accuracy`: the
        share of a class's pixels that is right, averaged over classes that were wanted; `pixel_accuracy`: the share
        of all pixels. Published as mIoU, mAcc and aAcc, in percent.

    >>> segment_scores(np.array([[1, 1, 0], [0, 2, 0], [0, 0, 0]]))["mean_accuracy"]
    0.75
    """
    right, wanted, drawn = np.diag(counts), counts.sum(1), counts.sum(0)
    either = wanted + drawn - right
    return {
        "mean_iou": float(np.mean(right[either > 0] / either[either > 0])),
        "mean_accuracy": float(np.mean(right[wanted > 0] / wanted[wanted > 0])),
        "pixel_accuracy": float(right.sum() / counts.sum()),
    }
