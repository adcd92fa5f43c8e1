"""What a run logs of factored layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ortho_cli.linalg.product import factor_bound, non_orthogonality, nuclear_norm

from .adapter_layer import whole
from .factored_module import FactoredModule
from .factorized_base import FactorizedLayer

__all__ = ["product_summary"]


@torch.no_grad()
def product_summary(layers: Sequence[FactoredModule], lr: float | None) -> dict[str, float]:
    r"""Means over layers of what the paper plots.

    `product_norm` is `||U M VT||_F`; `nuclear_norm` the sum of its singular values and `nuclear_bound`
    `(||U||^2 + ||M VT||^2) / 2`, which weight decay on two factors shrinks and which equals it for balanced ones;
    `non_orthogonality` of the two factors' components, 0 at a spectral start. Under a norm a step counts for what it
    turns, so `effective_lr` is `lr / ||W||_F` and `effective_lr_squared` `lr / ||W||_F^2`.

    Args:
        layers: factored ones; the last three are of matrix factors only.
        lr: the learning rate; None before the first step.

    Cost: `O(r^2 (m + n))` a layer, and one SVD of an `r x r` matrix.
    Reference: FNL, arXiv:2105.01029, section 3 and figures 1 to 3.
    """
    found: dict[str, list[torch.Tensor]] = {}
    for layer in layers:
        norm = layer.squared_norm(*map(whole, layer.factor_parameters())).sqrt()
        values = {"product_norm": norm}
        if isinstance(layer, FactorizedLayer):
            u, vt = layer.form.unstack(*map(whole, layer.pair()))
            values |= {
                "nuclear_norm": nuclear_norm(u, vt),
                "nuclear_bound": factor_bound(u, vt),
                "non_orthogonality": torch.stack(non_orthogonality(u, vt)),
            }
        if lr is not None:
            values |= {"effective_lr": lr / norm, "effective_lr_squared": lr / norm.square()}
        for name, value in values.items():
            found.setdefault(name, []).append(value.mean())
    return {name: float(torch.stack([value.double().cpu() for value in each]).mean()) for name, each in found.items()}
