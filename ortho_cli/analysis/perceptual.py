"""LPIPS, the perceptual distance of two pictures, where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from .evaluation import Missing
from .path_length import Distance

__all__ = ["LPIPS", "load_lpips"]

LPIPS = "LPIPS (VGG)"
COMMAND = "pip install lpips torchvision, of the same build as torch"
SIDE = 256  # of StyleGAN's path length


def load_lpips(device: torch.device, side: int = SIDE) -> Distance:
    """The distance of two batches of pictures in [-1, 1], in colour: ``(B,)``.

    Args:
        device: where it works.
        side: larger pictures are averaged down to it.

    Raises:
        Missing: lpips or torchvision is not installed, or VGG's weights cannot be had.
    """
    for library in ("lpips", "torchvision"):
        if importlib.util.find_spec(library) is None:
            raise Missing(f"{library} is not installed", COMMAND)
    try:
        network: Any = importlib.import_module("lpips").LPIPS(net="vgg", verbose=False).to(device).eval()
    except OSError as error:  # torchvision fetches them into torch.hub's cache
        raise Missing(
            f"the weights of VGG are not there: {str(error)[:120]}",
            "python -c \"import lpips; lpips.LPIPS(net='vgg')\", with a network",
        ) from error

    def distance(first: Tensor, second: Tensor) -> Tensor:
        found: Tensor = network(*(_reduced(each, side) for each in (first, second)))
        return found.flatten()

    return distance


def _reduced(pictures: Tensor, side: int) -> Tensor:
    return adaptive_avg_pool2d(pictures, side) if pictures.shape[-1] > side else pictures
