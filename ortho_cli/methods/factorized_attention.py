r"""Smaller heads: the products inside attention, :math:`Q_h^T K_h` and :math:`O_h V_h`, by factors of lower rank.

A head's two products are factored as they stand, their rank is the size of the head. So attention is factored by heads
of fewer rows, which start from the best approximation of the products, or are drawn anew. It is for attention that
takes the size of its heads from its projections, and says so by `resizable_heads`.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from ortho_cli.errors import TargetError, UsageError
from ortho_cli.linalg.heads import output_value, output_value_weights, query_key, query_key_weights
from ortho_cli.linalg.spectral import spectral_factors

from .adapter_layer import whole
from .factorized_start import NARROW
from .inject import layer_seed

__all__ = ["resizable_attention", "shrink_heads_", "whole_heads"]

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


def resizable_attention(model: nn.Module) -> dict[str, Any]:
    """The attention layers of a model whose heads may become smaller, by name.

    Raises:
        TargetError: there are none.
    """
    found = {name: module for name, module in model.named_modules() if getattr(module, "resizable_heads", False)}
    if not found:
        raise TargetError(
            f"a {type(model).__name__} has no attention whose heads can become smaller",
            hint="leave attention out; its projections can be factored as layers",
        )
    return found


@torch.no_grad()
def shrink_heads_(model: nn.Module, scale: float, *, spectral: bool = True, seed: int = 0) -> dict[str, int]:
    r"""Make the heads of attention smaller, in place.

    A spectral start truncates the SVD of each head's two products. Scores are divided by the root of the head's size,
    which shrinks with it: the product is multiplied by what keeps them.

    Args:
        model: with attention that has `resizable_heads`.
        scale: size of a head after, over before, rounded down.
        spectral: start from the products; False draws the projections from U(-0.1, 0.1), as the paper's baselines.
        seed: of draws.

    Returns:
        The size of a head, by layer.

    Raises:
        TargetError: no such attention, or projections that are no plain layers.
        UsageError: nothing would be left, or nothing become smaller.

    Reference: FNL, arXiv:2105.01029, section 5; its code balances heads that are drawn small, this
        truncates whole ones.
    """
    sizes = {}
    for name, module in resizable_attention(model).items():
        layers = [getattr(module, part) for part in PROJECTIONS]
        odd = next((layer for layer in layers if type(layer) is not nn.Linear or layer.bias is not None), None)
        if odd is not None:
            raise TargetError(f"{name} has a {type(odd).__name__} for a projection, or one with a bias")
        before = layers[0].out_features // module.heads
        size = int(scale * before)
        if not 1 <= size < before:
            raise UsageError(
                f"rank_scale {scale} makes heads of {size} out of heads of {before} in {name}",
                hint="with attention: true it is below 1, and leaves each head a row",
            )
        weights = [layer.weight for layer in layers]
        if weights[0].is_meta:
            made = [weight.new_empty(_shape(weight, part, module.heads * size)) for part, weight in _named(weights)]
        elif spectral:
            made = _truncated(weights, module.heads, size)
        else:
            made = _drawn(weights, module.heads * size, torch.Generator().manual_seed(layer_seed(seed, name)))
        for part, weight in _named(made):
            setattr(module, part, _linear(weight))
        module.head_size_before = before
        sizes[name] = size
    return sizes


def whole_heads(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state with heads of their first size, so that it loads into the model as it was: zeros in the rows that went.

    Queries are multiplied by what the larger size divides scores by.
    """
    grown = dict(state)
    for name, module in model.named_modules():
        before: Any = getattr(module, "head_size_before", None)
        for part in PROJECTIONS if before is not None else ():
            key = f"{name}.{part}.weight"
            weight = state[key].T if part == "out_proj" else state[key]
            heads = weight.reshape(module.heads, -1, weight.shape[1])
            size = heads.shape[1]
            padded = torch.cat([heads, heads.new_zeros(len(heads), before - size, heads.shape[2])], 1).flatten(0, 1)
            padded = padded * sqrt(before / size) if part == "q_proj" else padded
            grown[key] = padded.T.contiguous() if part == "out_proj" else padded
    return grown


def _named(weights: list[Tensor]) -> list[tuple[str, Tensor]]:
    return list(zip(PROJECTIONS, weights, strict=True))


def _shape(weight: Tensor, part: str, inner: int) -> tuple[int, int]:
    return (weight.shape[0], inner) if part == "out_proj" else (inner, weight.shape[1])


def _truncated(weights: list[Tensor], heads: int, size: int) -> list[Tensor]:
    """Balanced factors of each head's two products, cut to the size."""
    query, key, value, output = map(whole, weights)
    kept = sqrt(size * heads / len(query))
    u, vt = query_key(query, key, heads)
    scores = spectral_factors(kept * (u @ vt), size)
    query, key = query_key_weights(scores.u, scores.vt, heads)
    u, vt = output_value(output, value, heads)
    written = spectral_factors(u @ vt, size)
    output, value = output_value_weights(written.u, written.vt, heads)
    return [query, key, value, output]


def _drawn(weights: list[Tensor], inner: int, generator: torch.Generator) -> list[Tensor]:
    return [
        torch.rand(_shape(weight, part, inner), generator=generator).mul_(2 * NARROW).sub_(NARROW).to(weight)
        for part, weight in _named(weights)
    ]


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    return layer
