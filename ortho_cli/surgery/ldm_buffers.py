"""Tensors that live in an LDM file and nowhere else, made anew from their definitions.

Noise schedule buffers (DDPM, arXiv 2006.11239, with Stable Diffusion's scaled-linear betas), the EMA counters, CLIP's
position ids, and what the HRA authors' strict loader wants besides: their hint encoder and `logvar`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any

from ortho_cli.checkpoints import layouts
from ortho_cli.checkpoints.reading import tensor_bytes
from ortho_cli.checkpoints.writer import Piece, computed

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CONTROL_SHAPES", "control_tensors", "ldm_only_pieces"]

TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.0120
EMA_DECAY = 0.9999
POSTERIOR_FLOOR = 1e-20  # the first posterior variance is 0; its logarithm is clipped here

# Channels of the hint encoder: eight 3x3 convolutions with activations between, so their places are even numbers.
_HINT_CHANNELS = (3, 16, 16, 32, 32, 96, 96, 256, 320)
CONTROL_SHAPES: dict[str, tuple[int, ...]] = {
    "control_model.time_embed.0.weight": (1280, 320),
    "control_model.time_embed.0.bias": (1280,),
    "control_model.time_embed.2.weight": (1280, 1280),
    "control_model.time_embed.2.bias": (1280,),
} | {
    f"control_model.input_hint_block.{2 * place}.{kind}": shape
    for place, (fan_in, fan_out) in enumerate(pairwise(_HINT_CHANNELS))
    for kind, shape in (("weight", (fan_out, fan_in, 3, 3)), ("bias", (fan_out,)))
}


def ldm_only_pieces(missing: Iterable[str]) -> list[Piece]:
    """Pieces for some of the 15 names that only LDM files have (`layouts.LDM_ONLY`)."""
    return [_piece(name, *layouts.LDM_ONLY[name], partial(_ldm_only, name)) for name in missing]


def _piece(name: str, dtype: str, shape: tuple[int, ...], make: Callable[[], Tensor]) -> Piece:
    def produce() -> Iterator[Any]:
        yield tensor_bytes(make())

    return computed(name, dtype, shape, produce)


def _ldm_only(name: str) -> Tensor:
    import torch

    if name.endswith("position_ids"):
        return torch.arange(77, dtype=torch.int64).view(1, 77)
    if name == "model_ema.decay":
        return torch.tensor(EMA_DECAY, dtype=torch.float32)
    if name == "model_ema.num_updates":
        return torch.tensor(0, dtype=torch.int32)
    return _schedule()[name].float()


def _schedule() -> dict[str, Tensor]:
    """The 12 buffers of the diffusion process, in float64."""
    import torch

    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, TIMESTEPS, dtype=torch.float64) ** 2
    alphas = 1 - betas
    product = alphas.cumprod(0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), product[:-1]])
    variance = betas * (1 - before) / (1 - product)
    return {
        "betas": betas,
        "alphas_cumprod": product,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": product.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - product).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - product).log(),
        "sqrt_recip_alphas_cumprod": (1 / product).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / product - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=POSTERIOR_FLOOR).log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1 - product),
        "posterior_mean_coef2": (1 - before) * alphas.sqrt() / (1 - product),
    }


def control_tensors(seed: int) -> list[Piece]:
    """`control_model.*` as a fresh hint encoder (zero output, so the base model is kept) and a zero `logvar`."""
    encoder = [_piece(name, "F32", shape, partial(_fresh, name, shape, seed)) for name, shape in CONTROL_SHAPES.items()]
    return [*encoder, _piece("logvar", "F32", (TIMESTEPS,), partial(_zeros, (TIMESTEPS,)))]


def _fresh(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """torch's own start for Linear and Conv2d, uniform within 1/sqrt(fan_in); the last convolution is zero."""
    import torch

    if name.startswith("control_model.input_hint_block.14."):
        return _zeros(shape)
    weight_shape = CONTROL_SHAPES[name.rpartition(".")[0] + ".weight"]
    bound = prod(weight_shape[1:]) ** -0.5
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _zeros(shape: tuple[int, ...]) -> Tensor:
    import torch

    return torch.zeros(shape)
