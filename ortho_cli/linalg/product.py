r"""Factored products `U VT` and `U M VT`, measured and decayed without being formed.

Everything here is made of the small Gram matrices :math:`G = U^T U` and :math:`H = V^T V`, as long as those are
cheaper than the product itself; an overcomplete product (rank near or above its sides) goes through the product.
All functions take leading batch dimensions: the heads of an attention layer, the groups of a convolution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ortho_cli.linalg.precision import at_least_float32

__all__ = [
    "factor_bound",
    "non_orthogonality",
    "nuclear_norm",
    "product_norm",
    "rebalance",
    "squared_norm",
]


def squared_norm(u: Tensor, vt: Tensor, mid: Tensor | None = None) -> Tensor:
    """Compute `||U M VT||_F^2`.

    Args:
        u: `(..., m, r)`, any plain float type; half types are computed in float32.
        vt: `(..., r, n)`.
        mid: `(..., r, r)`, where there is a third factor.

    Returns:
        `(...)`; differentiable.

    Cost: `r^2 (m + n)` multiply-adds, or `m n r` where that is less.
    Reference: FNL, arXiv:2105.01029.

    >>> u, vt = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), torch.tensor([[1.0, 2.0, 0.0], [3.0, 4.0, 1.0]])
    >>> squared_norm(u, vt).item(), squared_norm(u, vt, torch.tensor([[1.0, 1.0], [0.0, 2.0]])).item()
    (162.0, 774.0)
    """
    u, vt = _absorb(u, vt, mid)
    if prefers_product(u.shape[-2], vt.shape[-1], u.shape[-1], grams=1):
        return (u @ vt).square().sum((-2, -1))
    return ((u.mT @ u) * (vt @ vt.mT)).sum((-2, -1)).clamp_min(0)


def product_norm(u: Tensor, vt: Tensor, mid: Tensor | None = None) -> Tensor:
    """Compute `||U M VT||_F`; arguments and cost of :func:`squared_norm`."""
    return squared_norm(u, vt, mid).sqrt()


def nuclear_norm(u: Tensor, vt: Tensor, mid: Tensor | None = None) -> Tensor:
    """Compute the sum of the singular values of `U M VT`, from thin QR factors of the two sides.

    Returns:
        `(...)`.

    Cost: `O((m + n) r^2)`, never `m n`.

    >>> nuclear_norm(torch.eye(3, 2), 2 * torch.eye(2, 3)).item()
    4.0
    """
    values: Tensor = torch.linalg.svdvals(_inner(*_absorb(u, vt, mid))[1])
    return values.sum(-1)


def factor_bound(u: Tensor, vt: Tensor) -> Tensor:
    """Compute `(||U||_F^2 + ||VT||_F^2) / 2`, which bounds the nuclear norm of `U VT`, tightly for balanced factors.

    This is what plain weight decay on the factors penalises.

    Reference: Srebro and Shraibman, COLT 2005.

    >>> factor_bound(torch.eye(3, 2), 2 * torch.eye(2, 3)).item()
    5.0
    """
    u, vt = at_least_float32(u, "U"), at_least_float32(vt, "VT")
    return (u.square().sum((-2, -1)) + vt.square().sum((-2, -1))) / 2


def non_orthogonality(u: Tensor, vt: Tensor) -> tuple[Tensor, Tensor]:
    """Measure how far the columns of U and the rows of VT are from orthogonal: 0 for spectral factors, near 1 at worst.

    Returns:
        `||G - diag G||_F / ||G||_F` for `G = U^T U` and for `G = VT VT^T`, each `(...)`; 0 for factors of zeros.

    Cost: `r^2 (m + n)`.
    Reference: FNL, arXiv:2105.01029.

    >>> non_orthogonality(torch.eye(3, 2), torch.ones(2, 3))
    (tensor(0.), tensor(0.7071))
    """
    u, vt = at_least_float32(u, "U"), at_least_float32(vt, "VT")
    return _off_diagonal_share(u.mT @ u), _off_diagonal_share(vt @ vt.mT)


def rebalance(u: Tensor, vt: Tensor, mid: Tensor | None = None, rank: int | None = None) -> tuple[Tensor, Tensor]:
    r"""Give a product its balanced spectral factors, `U = P sqrt(S)` and `VT = sqrt(S) Q^T`, without forming it.

    Args:
        u: `(..., m, r)`.
        vt: `(..., r, n)`.
        mid: `(..., r, r)`; it is absorbed.
        rank: keep only the leading components; at most `min(m, n, r)` exist.

    Returns:
        New factors, in at least float32, with the same product (its best approximation of `rank`).

    Cost: `O((m + n) r^2)`.

    >>> u, vt = rebalance(torch.tensor([[4.0], [0.0]]), torch.tensor([[1.0, 0.0]]))
    >>> u.abs().tolist(), vt.abs().tolist()
    ([[2.0], [0.0]], [[2.0, 0.0]])
    """
    left, inner, right = _inner(*_absorb(u, vt, mid))
    p, values, qt = torch.linalg.svd(inner, full_matrices=False)
    root = values[..., :rank].sqrt()
    return left @ (p[..., :, :rank] * root[..., None, :]), (root[..., :, None] * qt[..., :rank, :]) @ right.mT


def prefers_product(rows: int, cols: int, rank: int, grams: int = 2) -> bool:
    """Whether forming the product costs less than `grams` passes with the Gram matrices.

    Both count multiply-adds: `r^2 (m + n)` a pass, against `m n r` for the product and as much for each gradient.
    """
    return grams * rank * (rows + cols) > (2 * grams - 1) * rows * cols


def _absorb(u: Tensor, vt: Tensor, mid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Two factors of the same product, in a working dtype; M goes to the shorter side."""
    u, vt = at_least_float32(u, "U"), at_least_float32(vt, "VT")
    if mid is None:
        return u, vt
    mid = at_least_float32(mid, "M")
    return (u @ mid, vt) if u.shape[-2] <= vt.shape[-1] else (u, mid @ vt)


def _inner(u: Tensor, vt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`Q1, R1 R2^T, Q2` with `U VT = Q1 (R1 R2^T) Q2^T`."""
    left, right = torch.linalg.qr(u), torch.linalg.qr(vt.mT)
    return left.Q, left.R @ right.R.mT, right.Q


def _off_diagonal_share(gram: Tensor) -> Tensor:
    diagonal = torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))
    whole: Tensor = torch.linalg.matrix_norm(gram)
    off: Tensor = torch.linalg.matrix_norm(gram - diagonal)
    return off / torch.where(whole > 0, whole, 1)
