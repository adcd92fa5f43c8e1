"""How often each layer of a model is applied, which is what its FLOPs cost beside its parameters.

A header does not say how large a picture is at some layer. Transformers apply every Linear to every token; where the
layers of Stable Diffusion's UNet stand is known from their names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ortho_cli.errors import UsageError

from .factorize_selection import FactorLayer

__all__ = ["positions"]

LATENT_SIDE = 64  # of a picture of 512 x 512
TEXT_TOKENS = 77
_BLOCK = re.compile(r"unet\.(down|mid|up)_blocks?(?:\.(\d+))?\.")


def positions(layers: Sequence[FactorLayer]) -> list[int]:
    """Applications of each layer for one sample (a picture of Stable Diffusion), or for one token.

    Raises:
        UsageError: a layer of which that is not known.
    """
    if any(layer.canonical.startswith("unet.") for layer in layers):
        deepest = max((int(match[2]) for x in layers if (match := _BLOCK.match(x.canonical)) and match[2]), default=0)
        return [_in_unet(layer.canonical, deepest) for layer in layers]
    convolution = next((layer for layer in layers if len(layer.info.shape) > 2), None)
    if convolution is not None:
        raise UsageError(
            f"--budget-unit flops: the checkpoint does not say how large a picture is at {convolution.name}",
            hint="use --budget-unit params, or leave convolutions out",
        )
    return [0 if layer.view.kind == "embedding" else 1 for layer in layers]


def _in_unet(name: str, deepest: int) -> int:
    if name.startswith("text_encoder."):
        return TEXT_TOKENS
    if not name.startswith("unet."):
        raise UsageError(
            f"--budget-unit flops: it is not known how often {name} is applied for one picture",
            hint="use --budget-unit params, or leave it out with --exclude",
        )
    if "time_emb" in name:
        return 1
    if name.endswith((".attn2.to_k", ".attn2.to_v")):
        return TEXT_TOKENS
    match = _BLOCK.match(name)
    if match is None:
        return LATENT_SIDE**2  # conv_in, conv_out
    level = {"down": int(match[2] or 0), "mid": deepest, "up": deepest - int(match[2] or 0)}[match[1]]
    level += ("downsamplers" in name) - ("upsamplers" in name)
    return int((LATENT_SIDE >> level) ** 2)
