"""Networks whose features tell pictures apart: the Inception of the published FID, or any of `transformers`."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ortho_cli.errors import CheckpointError
from ortho_cli.models.hf_base import Family, load_pretrained, read_config

from .evaluation import Missing
from .picture_metrics import Network

__all__ = ["INCEPTION", "HubNetwork", "as_unit", "load_network", "resized"]

INCEPTION = "inception"
FAMILY = Family("AutoModel", "a network of pictures", "features", "diffusion", "facebook/dinov2-small")
MEAN, STD, SIDE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224  # where a network's own are not told: ImageNet's


def load_network(name: str, device: torch.device) -> Network:
    """The network of that name, which never trains.

    Args:
        name: `inception`, or a hub id or folder that `AutoModel` reads.
        device: where it works.

    Raises:
        Missing: its library or weights are not there; with the command that fetches them.
    """
    return _Inception(device) if name == INCEPTION else HubNetwork(name, device)


class _Inception:
    """The Inception v3 of the published FID, pool3, as torchmetrics has it from torch-fidelity."""

    title = "Inception v3 (2015-12-05, pool3)"

    def __init__(self, device: torch.device) -> None:
        for library, command in (
            ("torchmetrics", "pip install 'ortho-cli[eval]'"), ("torch_fidelity", "pip install torch-fidelity"),
        ):  # fmt: skip
            if importlib.util.find_spec(library) is None:
                other = "; or name another network: --features facebook/dinov2-small"
                raise Missing(f"{library} is not installed", command + other)
        from torchmetrics.image.fid import NoTrainInceptionV3

        try:
            self.model: Any = NoTrainInceptionV3("inception-v3-compat", ["2048"]).to(device)
        except OSError as error:  # torch-fidelity fetches the weights into torch.hub's cache
            raise Missing(
                f"the weights of Inception are not there: {str(error)[:120]}",
                'python -c "from torchmetrics.image.fid import FrechetInceptionDistance as F; F()", with a network',
            ) from error
        self.model.use_antialias = False  # published numbers are of TensorFlow's resizing, as torch-fidelity has it

    def __call__(self, pictures: Tensor) -> Tensor:
        if pictures.is_floating_point():
            raise Missing(f"{self.title} takes bytes alone", "--features facebook/dinov2-small")
        found: Tensor = self.model(pictures)
        return found


class HubNetwork:
    """Any network of pictures that `AutoModel` reads, by its pooled output.

    That is the image embedding of a CLIP, the pooled output where there is one, else the mean over all places.

    Raises:
        Missing: transformers is not installed, or the weights cannot be had.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        if importlib.util.find_spec("transformers") is None:
            raise Missing("transformers is not installed", "pip install 'ortho-cli[diffusion]'")
        import transformers

        processor: Any = transformers.AutoImageProcessor
        self.title = Path(name).name if Path(name).is_dir() else name
        try:
            model, _ = load_pretrained(FAMILY, name, read_config(FAMILY, name), new_head=True)
        except CheckpointError as error:
            command = None if Path(name).is_dir() else f"hf download {name}"
            raise Missing(error.message.removeprefix("model.base "), command) from error
        self.model: nn.Module = model.to(device).eval().requires_grad_(False)
        try:
            told = processor.from_pretrained(name).to_dict()
        except (OSError, ValueError):  # the weights are there, and no processor beside them
            told = {}
        self.mean, self.std = told.get("image_mean") or MEAN, told.get("image_std") or STD
        self.side = _side(told, self.model)

    def normalized(self, pictures: Tensor) -> Tensor:
        """Pictures as the network was trained to see them: its side, its mean and deviation of each channel."""
        values = resized(as_unit(pictures), self.side)
        mean, std = (values.new_tensor(each)[:, None, None] for each in (self.mean, self.std))
        return (values - mean) / std

    def __call__(self, pictures: Tensor) -> Tensor:
        model: Any = self.model
        embed = getattr(model, "get_image_features", None) or partial(model)
        found: Any = embed(pixel_values=self.normalized(pictures))
        if not isinstance(found, Tensor):
            pooled = getattr(found, "pooler_output", None)
            found = found.last_hidden_state if pooled is None else pooled
        if found.dim() == 3:  # places, and features of each
            found = found.mean(1)
        whole: Tensor = found.flatten(2).mean(2) if found.dim() == 4 else found
        return whole.float()


def as_unit(pictures: Tensor) -> Tensor:
    """Bytes as float in [0, 1]; floats as they are."""
    return pictures if pictures.is_floating_point() else pictures.float() / 255


def resized(pictures: Tensor, side: int) -> Tensor:
    """`(B, C, side, side)`, smoothed where it gets smaller."""
    if pictures.shape[-2:] == (side, side):
        return pictures
    return F.interpolate(pictures, (side, side), mode="bicubic", align_corners=False, antialias=True)


def _side(told: dict[str, Any], model: nn.Module) -> int:
    """The side of pictures that a processor cuts out or makes, else that the model has positions for."""
    for key in ("crop_size", "size"):
        found = told.get(key) or {}
        side = found if isinstance(found, int) else found.get("height") or found.get("shortest_edge")
        if side:
            return int(side)
    config: Any = model.config
    config = getattr(config, "vision_config", config)
    side = getattr(config, "image_size", None)
    return side if isinstance(side, int) else SIDE
