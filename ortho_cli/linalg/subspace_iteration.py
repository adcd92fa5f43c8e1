"""The leading singular subspace of a matrix from a few products with random vectors."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["leading_subspace", "prefers_subspace"]


def prefers_subspace(rows: int, cols: int, rank: int, tolerance: float) -> bool:
    """Whether :func:`leading_subspace` keeps the tolerance and is cheaper than the whole spectrum."""
    return tolerance >= 0.01 and 4 * rank <= min(rows, cols)


def leading_subspace(side: Tensor, rank: int, *, tolerance: float = 0.01, seed: int = 0) -> Tensor:
    """Orthonormal `(..., n, rank)` close to the leading right singular vectors of `side (..., m, n)`."""
    n = side.shape[-1]
    width = min(n, rank + max(8, rank // 5))
    draw = torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=side.dtype).to(side.device)
    basis = torch.linalg.qr(side.mT @ (side @ draw)).Q
    for _ in range(3):
        basis = torch.linalg.qr(side.mT @ (side @ basis)).Q
    projected = side @ basis
    _, vectors = torch.linalg.eigh((projected.mT @ projected).double())
    leading: Tensor = basis @ vectors.flip(-1)[..., :rank].to(side.dtype)
    return leading
