r"""Frobenius decay: the gradient of :math:`\tfrac12\|U M V^T\|_F^2` for every factor, in closed form.

Weight decay on the factors shrinks the nuclear norm of a layer, that is its rank; this decays the layer's own norm, as
weight decay does for a dense one. No autograd, no product, and for many layers one batched call a shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ortho_cli.linalg.precision import at_least_float32
from ortho_cli.linalg.product import prefers_product

__all__ = ["add_decay_gradients_", "decay_gradients"]


def decay_gradients(u: Tensor, vt: Tensor, mid: Tensor | None = None) -> tuple[Tensor, ...]:
    r"""Differentiate :math:`\tfrac12 \|U M V^T\|_F^2`.

    With two factors `dU = U (VT VT^T)` and `dVT = (U^T U) VT`: their inner products with the factors all equal the
    square norm, and they do not change `U^T U - VT VT^T`. Where the rank is near the sides or above, the product
    itself is the cheaper way, `dU = W VT^T` and `dVT = U^T W`.

    Args:
        u: `(..., m, r)`, any plain float type; half types are computed in float32.
        vt: `(..., r, n)`.
        mid: `(..., r, r)`, where there is a third factor.

    Returns:
        `(dU, dVT)` or `(dU, dVT, dM)`, shaped as the factors, in at least float32.

    Cost: `2 r^2 (m + n)` multiply-adds, with M `5 r^3` more; or `3 m n r`, with M `3 r^2 min(m, n)` more.
    Reference: FNL, arXiv:2105.01029, section 4.

    >>> u, vt = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), torch.tensor([[1.0, 2.0, 0.0], [3.0, 4.0, 1.0]])
    >>> [gradient.tolist() for gradient in decay_gradients(u, vt)]
    [[[5.0, 11.0], [22.0, 52.0], [16.0, 37.0]], [[5.0, 8.0, 1.0], [16.0, 22.0, 5.0]]]
    """
    u, vt = at_least_float32(u, "U"), at_least_float32(vt, "VT")
    rows, cols, rank = u.shape[-2], vt.shape[-1], u.shape[-1]
    if mid is None:
        if prefers_product(rows, cols, rank):
            product = u @ vt
            return product @ vt.mT, u.mT @ product
        return u @ (vt @ vt.mT), (u.mT @ u) @ vt
    mid = at_least_float32(mid, "M")
    if 2 * rank * (rows + cols) + 5 * rank**2 > 3 * rows * cols + 3 * rank * min(rows, cols):
        if rows > cols:
            d_vt, d_u, d_mid = decay_gradients(vt.mT, u.mT, mid.mT)
            return d_u.mT, d_vt.mT, d_mid.mT
        left = u @ mid
        product = left @ vt
        inward = product @ vt.mT
        return inward @ mid.mT, left.mT @ product, u.mT @ inward
    gram_u, gram_v = u.mT @ u, vt @ vt.mT
    mid_gram, gram_mid = mid @ gram_v, gram_u @ mid
    return u @ (mid_gram @ mid.mT), (mid.mT @ gram_mid) @ vt, gram_u @ mid_gram


def add_decay_gradients_(
    factors: Sequence[tuple[Tensor, ...]], gradients: Sequence[tuple[Tensor, ...]], coef: float
) -> None:
    r"""Add :math:`\mathrm{coef}\cdot\nabla\tfrac12\|U M V^T\|^2` of many layers to their gradients, in place.

    Args:
        factors: of each layer `(U, VT)` or `(U, VT, M)`.
        gradients: tensors of the same shapes, added to in their own dtype.
        coef: the decay's strength.
    """
    with torch.no_grad():
        for parts, sums in zip(factors, gradients, strict=True):
            for total, gradient in zip(sums, decay_gradients(*parts), strict=True):
                total.add_(gradient.to(total.dtype), alpha=coef)
