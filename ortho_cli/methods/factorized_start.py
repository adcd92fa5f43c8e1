"""First values of factors: the SVD of a weight (spectral initialisation), or the draws of the paper's baselines."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from ortho_cli.linalg.matricize import Matricization
from ortho_cli.linalg.spectral import spectral_factors

from .factorized_base import FactorizedLayer

__all__ = ["PLAIN_STARTS", "draw_plain_", "fill_spectral_"]

PLAIN_STARTS = ("kaiming", "fan-in", "fan-out", "uniform")
# The paper's translation models: factors of linear layers from U(-0.1, 0.1), of embeddings from N(0, 0.1^2).
NARROW = 0.1


@torch.no_grad()
def fill_spectral_(
    layer: FactorizedLayer, weight: Tensor, generator: torch.Generator, *, compat: str | None = None
) -> None:
    r"""Give a layer the balanced SVD factors of a weight, :math:`U\sqrt S` and :math:`\sqrt S V^T`.

    A matrix has no more components than its shorter side. Where the rank is above, the others start as LoRA does: one
    of the two factors random, of the length of an average component, the other zero (the first half in U, the rest in
    VT). So the product is the weight, and every component learns; zeros in both, as the paper's code has them, have no
    gradient and stay zero for ever.

    Args:
        layer: to fill; `M`, where there is one, stays the identity.
        weight: in the dense layer's shape.
        generator: on the CPU.
        compat: "paper" decomposes a convolution's weight read row by row and leaves further components zero.
    """
    form = layer.form
    raw = compat == "paper" and form.kind == "conv" and form.groups == 1
    matrix = form.to_matrix(weight.detach(), "raw-reshape" if raw else None)
    found = spectral_factors(matrix, min(layer.rank, form.rows, form.cols))
    u, vt = found.u, found.vt
    extra = layer.rank - u.shape[-1]
    if extra:
        length = 0.0 if compat == "paper" else found.values.mean(-1, keepdim=True).unsqueeze(-1).sqrt()
        left = extra - extra // 2
        more_u = _normal((*u.shape[:-1], extra), u, generator) * (length / sqrt(form.rows))
        more_vt = _normal((*vt.shape[:-2], extra, form.cols), vt, generator) * (length / sqrt(form.cols))
        more_u[..., left:], more_vt[..., :left, :] = 0, 0
        u, vt = torch.cat([u, more_u], -1), torch.cat([vt, more_vt], -2)
    for own, value in zip((layer.U, layer.VT), form.stack(u, vt), strict=True):
        own.copy_(value)


@torch.no_grad()
def draw_plain_(layer: FactorizedLayer, generator: torch.Generator, start: str | None = None) -> None:
    """Draw both factors independently, as the paper's baselines do; U first.

    Args:
        layer: to fill; `M`, where there is one, stays the identity.
        generator: on the CPU.
        start: "kaiming", each factor by its own fan-in, `N(0, 2 / rank)` and `N(0, 2 / cols)` (the CIFAR ResNets);
            "fan-in", both `N(0, 2 / fan-in of the layer)` (VGG); "fan-out", both `N(0, 2 / fan-out)` (WRN); "uniform",
            both `U(-0.1, 0.1)` (linear layers of the Transformer). None: uniform for linear layers, `N(0, 0.01)` for
            embeddings, kaiming for convolutions.

    Reference: FNL, arXiv:2105.01029, and its code.
    """
    form = layer.form
    if start is None:
        start = "kaiming" if form.kind in ("conv", "transposed") else "uniform"
        if form.kind == "embedding":
            start = "narrow"
    inputs, outputs = _fans(form)
    stds = {
        "kaiming": (sqrt(2 / layer.rank), sqrt(2 / form.cols)),
        "fan-in": (sqrt(2 / inputs),) * 2,
        "fan-out": (sqrt(2 / outputs),) * 2,
        "narrow": (NARROW,) * 2,
    }
    for own, place in ((layer.U, 0), (layer.VT, 1)):
        if start == "uniform":
            own.copy_(torch.rand(own.shape, generator=generator).mul_(2 * NARROW).sub_(NARROW))
        else:
            own.copy_(_normal(own.shape, own, generator) * stds[start][place])


def _fans(form: Matricization) -> tuple[int, int]:
    """Weights into one output, and out of one input."""
    taps = form.shape[2:]
    outputs = form.shape[0] // form.groups if form.kind == "conv" else form.shape[1] if taps else form.rows
    return form.rows * form.cols // outputs, outputs * torch.Size(taps).numel()


def _normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator).to(device=like.device, dtype=like.dtype)
