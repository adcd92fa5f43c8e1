"""The Frechet distance of two Gaussians: how far apart two sets of features are, by their means and covariances."""

from __future__ import annotations

from torch import Tensor
from torch.linalg import eigh, eigvalsh

__all__ = ["frechet_distance"]


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
    """``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2)``, the squared 2-Wasserstein distance.

    Args:
        mean1: ``(d,)`` float64; so are the others.
        cov1: ``(d, d)``, positive semi-definite to rounding.
        mean2: ``(d,)``.
        cov2: ``(d, d)``.

    Returns:
        A scalar, not negative.

    Cost: two symmetric eigendecompositions of order d, real whatever rounding did, where a square root of ``C1 C2``
    turns complex.
    Reference: Dowson and Landau 1982; of Inception features it is the FID of arXiv:1706.08500.

    >>> import torch
    >>> zero, one = torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    >>> frechet_distance(zero, one, zero + 1, 4 * one).item()
    4.0
    """
    values, vectors = eigh(cov1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    between = eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    distance: Tensor = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * between
    return distance.clamp(min=0)
