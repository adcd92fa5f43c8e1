"""The hint encoder of controllable generation: a picture of edges, segments or landmarks, as features of a UNet.

Eight convolutions take the hint to the size of the latents; the result is added behind the UNet's first convolution,
and nowhere else. It starts at zero, so that the model draws at first as if there were no hint. It is all that is left
of ControlNet where the UNet itself is adapted (Qiu et al. 2023, arXiv:2306.07280; HRA, arXiv:2405.17484).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ortho_cli.checkpoints.reading import TensorReader
from ortho_cli.errors import CheckpointError

if TYPE_CHECKING:
    from ortho_cli.checkpoints.checkpoint import Checkpoint

__all__ = ["CONTROL", "STRIDE", "HintEncoder", "add_hint_encoder", "hint_added", "load_hint_encoder"]

CONTROL = "control_model"  # what LDM files call it, and so the name of the module in a model
STRIDE = 8  # pixels of a hint for one of the latents, of whatever autoencoder
CHANNELS = (3, 16, 16, 32, 32, 96, 96, 256)
HALVING = frozenset({2, 4, 6})  # places of the convolutions of stride two
UNUSED = f"{CONTROL}.time_embed."  # the published files carry an embedding of time that nothing reads


class HintEncoder(nn.Module):
    """Features of a hint, in the names of the published checkpoints.

    Args:
        channels: of the UNet's first feature map; 320 in Stable Diffusion 1.5, which makes 1,086,480 parameters.

    Shapes: `(B, 3, 8H, 8W)` in [0, 1] to `(B, channels, H, W)`.

    Reference: Zhang et al. 2023, arXiv:2302.05543, section 3.3; diffusers' `ControlNetConditioningEmbedding` is equal.

    >>> encoder = HintEncoder(320)
    >>> sum(parameter.numel() for parameter in encoder.parameters())
    1086480
    >>> features = encoder(torch.rand(1, 3, 64, 64))
    >>> tuple(features.shape), bool(features.any())
    ((1, 320, 8, 8), False)
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = (*CHANNELS, channels)
        layers: list[nn.Module] = []
        for place, (before, after) in enumerate(pairwise(widths)):
            layers += [nn.Conv2d(before, after, 3, stride=2 if place in HALVING else 1, padding=1), nn.SiLU()]
        self.input_hint_block = nn.Sequential(*layers[:-1])
        for parameter in self.input_hint_block[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, hint: Tensor) -> Tensor:
        features: Tensor = self.input_hint_block(hint)
        return features


def add_hint_encoder(model: Any) -> HintEncoder:
    """Give a Stable Diffusion a hint encoder, which trains beside any adapter of the rest and is saved with it.

    Args:
        model: a `StableDiffusion`, changed in place.
    """
    encoder = HintEncoder(model.unet.config.block_out_channels[0])
    setattr(model, CONTROL, encoder)
    model.task_head = (CONTROL,)
    return encoder


@contextmanager
def hint_added(first: nn.Module, features: Tensor) -> Iterator[None]:
    """Let the first convolution of a UNet give its output plus a hint's features, for as long as this lasts.

    Args:
        first: the convolution, `unet.conv_in`.
        features: `(B, C, H, W)` of a :class:`HintEncoder`; cast to what they are added to. Where the UNet is called
            with several times as many latents (without and with the prompt), every such part gets them.

    >>> conv, features = nn.Conv2d(4, 2, 1), torch.ones(1, 2, 5, 5)
    >>> plain = conv(torch.zeros(2, 4, 5, 5))
    >>> with hint_added(conv, features):
    ...     torch.equal(conv(torch.zeros(2, 4, 5, 5)), plain + 1)
    True
    """

    def add(module: nn.Module, given: object, output: Tensor) -> Tensor:
        times, rest = divmod(len(output), len(features))
        if rest or output.shape[1:] != features.shape[1:]:
            raise ValueError(f"features {tuple(features.shape)} do not go onto {tuple(output.shape)}")
        return output + features.to(output.dtype).repeat(times, 1, 1, 1)

    handle = first.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def load_hint_encoder(encoder: HintEncoder, checkpoint: Checkpoint) -> list[str]:
    """Fill a hint encoder from a checkpoint that holds one, in place; one that holds none leaves it as it is.

    Returns:
        What the user should know, in sentences.

    Raises:
        CheckpointError: some of its tensors are missing, or of another shape.
    """
    found = {name: info for name, info in checkpoint.tensors.items() if name.startswith(f"{CONTROL}.")}
    state = {f"{CONTROL}.{name}": tensor for name, tensor in encoder.state_dict().items()}
    unused = [name for name in found if name.startswith(UNUSED)]
    strange = sorted(found.keys() - state.keys() - set(unused))
    if strange:
        raise CheckpointError(
            f"{strange[0]!r} is no part of a hint encoder, which is all of a ControlNet that is used here",
            where=str(checkpoint.root),
        )
    if found.keys().isdisjoint(state):
        return []
    wrong = [name for name, tensor in state.items() if name not in found or found[name].shape != tuple(tensor.shape)]
    if wrong:
        there = found[wrong[0]].shape if wrong[0] in found else "nothing"
        raise CheckpointError(
            f"the hint encoder of the base lacks or differs in {len(wrong)} of {len(state)} tensors, first "
            f"{wrong[0]!r}: {there}, expected {tuple(state[wrong[0]].shape)}",
            where=str(checkpoint.root),
        )
    with TensorReader() as reader, torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(reader.read(found[name]))
    notes = ["goes on with the base's own hint encoder"]
    return notes + ([f"{len(unused)} tensors {UNUSED}* are left out: nothing reads them"] if unused else [])
