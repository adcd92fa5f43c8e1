"""Canny's edges of a picture, by OpenCV: what canny hints are, and what pictures drawn to them are judged by."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ortho_cli.errors import UsageError

__all__ = ["HIGH", "LOW", "canny"]

LOW, HIGH = 100.0, 200.0  # of ControlNet, OFT and HRA: gradients above HIGH are edges, and above LOW where these go on


def canny(pixels: NDArray[np.uint8], low: float = LOW, high: float = HIGH) -> NDArray[np.bool_]:
    """Find the edges of a picture (Canny 1986).

    Args:
        pixels: `(H, W, 3)` colour or `(H, W)` grey; of colours the channel that changes most counts.
        low: gradients below it are no edges.
        high: gradients above it are; those between are where they touch one.

    Returns:
        `(H, W)`, true at edges.

    Raises:
        UsageError: OpenCV is not installed.

    >>> square = np.zeros((9, 9), np.uint8); square[3:6, 3:6] = 255
    >>> bool(canny(square).any()), bool(canny(np.zeros((9, 9), np.uint8)).any())
    (True, False)
    """
    cv2 = _opencv()
    edges: NDArray[Any] = cv2.Canny(np.ascontiguousarray(pixels), low, high)
    return edges > 0


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise UsageError("canny edges need OpenCV", hint="pip install 'ortho-cli[eval]'") from error
    return cv2
