"""The polar factor by matrix products alone, for accelerators: Polar Express, and a polish to the last digit."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ortho_cli.linalg.spectral import frobenius_norm

__all__ = ["POLISHED", "Iterated", "isometry_defect", "polar_express"]

# Odd polynomials a x + b x^3 + c x^5 that together bring singular values in [1e-3, 1] to 1, each the best one for the
# interval the last one leaves, eased by 1 % so that rounding cannot carry a value out of it.
# Reference: Amsel, Persson, Musco and Gower 2025, "The Polar Express", arXiv:2505.16932, algorithm 1.
POLYNOMIALS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
)
EASED = 1.01
POLISH = (1.875, -1.25, 0.375)  # the same for an interval around 1: converges cubically, turns nothing
POLISHED, MOST_POLISHES = 8, 12  # roundings that are left; a singular value of 1e-5 needs that many
PROBES, POWERS = 4, 16


class Iterated(NamedTuple):
    """The `factor (m, n)`, estimates of the largest and smallest singular value, and how far it is from an isometry."""

    factor: Tensor
    sigma_max: float
    sigma_min: float
    error: float


def polar_express(tall: Tensor) -> Iterated:
    """Find the polar factor of a tall matrix `(m, n)` by products alone, in its own precision.

    In bfloat16 it would be the factor of a matrix that lies 1e-2 away, which no polish undoes.

    Cost: 15 to 25 products of `2 m n^2` flops.

    >>> polar_express(torch.tensor([[3.0, 0.0], [0.0, -2.0]])).factor.round(decimals=5).tolist()
    [[1.0, 0.0], [0.0, -1.0]]
    """
    norm = float(frobenius_norm(tall))
    scaled = tall / norm if norm else tall
    bound = norm * float(torch.linalg.matrix_norm(scaled.mT @ scaled).sqrt())  # at least the largest singular value
    factor = tall / (bound * EASED) if bound else torch.zeros_like(tall)
    for a, b, c in POLYNOMIALS:
        factor = _quintic(factor, a / EASED, b / EASED**3, c / EASED**5)
    for _ in range(MOST_POLISHES):
        factor = _quintic(factor, *POLISH)
        error = isometry_defect(factor)
        if error < POLISHED * torch.finfo(factor.dtype).eps:
            break
    return Iterated(factor, *_extremes(factor.mT @ tall), error)


def isometry_defect(factor: Tensor) -> float:
    """`||(G^2 - G) X||_F / ||X||_F` with `G = P^T P`, which is a projection where P is an isometry, and random X.

    >>> isometry_defect(torch.eye(3)), isometry_defect(torch.zeros(3, 2))
    (0.0, 0.0)
    """
    probes = _probes(factor)
    once = factor.mT @ (factor @ probes)
    twice = factor.mT @ (factor @ once)
    return float(frobenius_norm(twice - once) / frobenius_norm(probes))


def _quintic(x: Tensor, a: float, b: float, c: float) -> Tensor:
    squared = x.mT @ x
    return a * x + x @ (b * squared + c * squared @ squared)


def _extremes(stretch: Tensor) -> tuple[float, float]:
    """The largest and smallest eigenvalue of `H`, by power iteration with H and with its Cholesky factor's inverse."""
    stretch = (stretch + stretch.mT).double() / 2
    block = _probes(stretch)
    for _ in range(POWERS):
        block = torch.linalg.qr(stretch @ block).Q
    largest = float(torch.linalg.matrix_norm(stretch @ block, ord=2))
    triangle, failed = torch.linalg.cholesky_ex(stretch)
    if bool(failed):
        return largest, 0.0
    block = _probes(stretch)
    for _ in range(POWERS):
        block = torch.linalg.qr(torch.cholesky_solve(block, triangle)).Q
    return largest, 1 / float(torch.linalg.matrix_norm(torch.cholesky_solve(block, triangle), ord=2))


def _probes(matrix: Tensor) -> Tensor:
    """A few columns of signs, the same for every matrix of this width."""
    width = matrix.shape[1]
    signs = torch.randint(0, 2, (width, min(PROBES, width)), generator=torch.Generator().manual_seed(0))
    return (2 * signs - 1).to(matrix)
