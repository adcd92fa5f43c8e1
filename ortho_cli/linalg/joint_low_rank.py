r"""Several low-rank additions in one pair of bases: `B_i A_i = L C_i R`, `L` and `R` orthonormal, `C_i (p, q)` small.

What task arithmetic does entry by entry to whole weights is done to the cores, at no cost that grows with the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from ortho_cli.errors import TargetError
from ortho_cli.linalg.product import rebalance

__all__ = ["JointFactors", "dare", "join_factors", "split", "ties"]

NULL = 1e-10  # directions shorter than this share of the longest are rounding


class JointFactors(NamedTuple):
    """`left (out, p)`, `right (q, in)`, orthonormal; `cores (n, p, q)`; all float64."""

    left: Tensor
    right: Tensor
    cores: Tensor


def join_factors(factors: Sequence[tuple[Tensor, Tensor]]) -> JointFactors:
    """Write low-rank products in bases of all their columns and all their rows.

    Args:
        factors: `(B (out, r_i), A (r_i, in))`, scales included.

    Raises:
        TargetError: products of different shapes.

    Cost: `O((out + in) r^2)` with `r` the sum of the ranks.

    >>> joint = join_factors([(torch.ones(3, 1), torch.ones(1, 2))])
    >>> [round(abs(value), 4) for value in joint.cores.flatten().tolist()]     # sqrt(3) sqrt(2)
    [2.4495]
    """
    shapes = sorted({(up.shape[0], down.shape[1]) for up, down in factors})
    if len(shapes) != 1:
        raise TargetError(f"low-rank adapters of weights of shapes {' and '.join(map(str, shapes))}")
    # Balanced, so that the bases depend on the products alone and not on how each is split into factors.
    balanced = [rebalance(up.double(), down.double()) for up, down in factors]
    left = _span(torch.cat([up for up, _ in balanced], dim=1))
    right = _span(torch.cat([down for _, down in balanced]).T).T
    cores = torch.stack([(left.T @ up) @ (down @ right.T) for up, down in balanced])
    return JointFactors(left, right, cores)


def _span(columns: Tensor) -> Tensor:
    basis, singular, _ = torch.linalg.svd(columns, full_matrices=False)
    kept: Tensor = basis[:, singular > NULL * singular.max()] if singular.numel() else basis
    return kept


def ties(cores: Tensor, weights: Sequence[float], density: float) -> Tensor:
    """Trim each to its largest entries, let every entry's signs vote, and average those that won.

    Args:
        cores: `(n, p, q)`.
        weights: one each, times its entries.
        density: the share of entries that each keeps, in (0, 1].

    Returns:
        `(p, q)`.

    Reference: TIES-Merging, arXiv:2306.01708, section 3, on cores in place of weights (as in Core Space, 2025).

    >>> ties(torch.tensor([[[3.0, -1.0]], [[1.0, 2.0]]]), [1.0, 1.0], density=1.0).tolist()
    [[2.0, 2.0]]
    """
    kept = max(1, round(density * cores[0].numel())) if cores[0].numel() else 0
    trimmed = torch.zeros_like(cores)
    for index, (core, weight) in enumerate(zip(cores, weights, strict=True)):
        chosen = core.abs().flatten().topk(kept).indices
        trimmed[index].view(-1)[chosen] = weight * core.flatten()[chosen]
    sign = trimmed.sum(dim=0).sign()
    agreeing = (trimmed.sign() == sign) & (sign != 0)
    mean: Tensor = (trimmed * agreeing).sum(dim=0) / agreeing.sum(dim=0).clamp_min(1)
    return mean


def dare(cores: Tensor, weights: Sequence[float], density: float, seed: int) -> Tensor:
    """Drop entries at random, scale up what is left so that the expectation stays, and add.

    Args:
        cores: `(n, p, q)`.
        weights: one each.
        density: the chance of an entry to stay, in (0, 1].
        seed: of the draw.

    Returns:
        `(p, q)`.

    Reference: DARE, arXiv:2311.03099, section 3.

    >>> dare(torch.ones(2, 1, 2), [1.0, 0.5], density=1.0, seed=0).tolist()
    [[1.5, 1.5]]
    """
    generator = torch.Generator().manual_seed(seed)
    stays = torch.rand(cores.shape, generator=generator) < density
    dropped: Tensor = torch.einsum("n,npq->pq", torch.tensor(weights, dtype=cores.dtype), cores * stays / density)
    return dropped


def split(joint: JointFactors, core: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, float]:
    """Balanced factors of `L C R`, of the core's rank (0 for no change at all) or truncated to a given one.

    Args:
        joint: the bases.
        core: `C (p, q)`.
        rank: the most components to keep.

    Returns:
        `B (out, r)`, `A (r, in)`, float64, and the error `||L C R - B A||_F` of the truncation.

    >>> joint = join_factors([(torch.eye(3)[:, :2], torch.eye(2))])
    >>> up, down, error = split(joint, joint.cores[0], rank=1)
    >>> up.shape, down.shape, error
    (torch.Size([3, 1]), torch.Size([1, 2]), 1.0)
    """
    left, singular, right = torch.linalg.svd(core.double(), full_matrices=False)
    needed = int((singular > NULL * singular.max()).sum()) if singular.numel() else 0
    kept = needed if rank is None else min(rank, needed)
    root = singular[:kept].sqrt()
    error = sqrt(float(singular[kept:].square().sum()))
    return joint.left @ (left[:, :kept] * root), (root[:, None] * right[:kept]) @ joint.right, error
