r"""The leading singular subspace of a matrix from a few products with a block of random vectors.

A random block is passed through a polynomial of :math:`A = W^T W` that is small on the spectrum to be dropped and large
on the part to be kept. The polynomial is Chebyshev's on `[0, a]`, which on a flat spectrum, where plain powers need
many rounds, gets the same subspace from half the products; `a` follows from the Ritz values of the first round.
"""

from __future__ import annotations

from math import cos, pi

import torch
from torch import Tensor

__all__ = ["gram", "leading_subspace", "prefers_subspace"]

# Vectors beyond the rank, and the degree: together within 1 % of the smallest squared error on every family of spectra
# of the tests (Gaussian of any aspect, linear, exponential and power-law decay, outliers); 0.9 % on the worst of them.
EXTRA_SHARE, EXTRA_LEAST, DEGREE = 0.15, 8, 3
TOLERANCE = 0.01
# The first Ritz value beyond the rank lies below its eigenvalue, after one round by about this factor.
EDGE = 1.15
# Below this side the whole spectrum is as cheap, and above this share of the side as well.
LEAST_SIDE, LARGEST_SHARE = 128, 0.4
# Where the spectrum to be kept rises further than this above the edge, the block is made orthonormal after each factor
# of the polynomial: the growth of all three at once would cost float32 its digits.
FLAT = 3.0
# Cholesky squares the condition: with a ratio of pivots below this, columns are orthogonalised one by one.
LEAST_PIVOT = 1e-2
# Rows that a Gram matrix takes at a time (the copy in its dtype stays small), its blocks, and the least they are wide:
# products of fewer columns cost more than they save.
GRAM_ENTRIES, GRAM_BLOCKS, GRAM_WIDTH = 2**22, 4, 64


def prefers_subspace(rows: int, cols: int, rank: int, tolerance: float) -> bool:
    """Whether :func:`leading_subspace` keeps the tolerance and costs less than the whole spectrum."""
    side = min(rows, cols)
    return tolerance >= TOLERANCE and side >= LEAST_SIDE and rank <= LARGEST_SHARE * side


def leading_subspace(side: Tensor, rank: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Approximate the leading right singular vectors of a tall matrix.

    Args:
        side: `W (..., m, n)`, `m >= n`, float32 or float64.
        rank: how many, at most `n`.
        seed: of the random block; drawn in float32 on the CPU, so that it is the same everywhere.

    Returns:
        `V (..., n, rank)`, orthonormal, in descending order of the Ritz values, and `W V (..., m, rank)`.

    Cost: with `l = 1.15 rank + 8`, eight products with W or six with its Gram matrix, of `l` columns each, and two
        eigenproblems of size `l`.
    Reference: Halko, Martinsson and Tropp 2011, algorithm 4.4; Zhou, Saad, Tiago and Chelikowsky 2006 (the filter).
    """
    m, n = side.shape[-2:]
    width = min(n, rank + max(EXTRA_LEAST, int(EXTRA_SHARE * rank)))
    squared = gram(side) if _prefers_gram(m, n, width) else None

    def apply(block: Tensor) -> Tensor:
        return side.mT @ (side @ block) if squared is None else squared @ block

    draw = torch.rand(m if squared is None else n, width, generator=torch.Generator().manual_seed(seed))
    draw = draw.to(side).sub_(0.5)
    basis = orthonormal(side.mT @ draw if squared is None else squared @ draw)
    image = apply(basis)
    ritz = torch.linalg.eigvalsh(basis.mT @ image)
    edge = EDGE * ritz[..., max(0, width - rank - 1), None, None].clamp_min(0)
    steep = bool((ritz[..., -1, None, None] > FLAT * edge).any())
    for factor in range(DEGREE):
        root = edge * (1 + cos((2 * factor + 1) * pi / (2 * DEGREE))) / 2
        basis = (image if factor == 0 else apply(basis)).sub_(root * basis)
        if steep and factor < DEGREE - 1:
            basis = orthonormal(basis)
    basis = orthonormal(orthonormal(basis))
    product = side @ basis if squared is None else squared @ basis
    small = product.mT @ product if squared is None else basis.mT @ product
    turn = torch.linalg.eigh(small).eigenvectors.flip(-1)[..., :rank]
    basis = basis @ turn
    return basis, product @ turn if squared is None else side @ basis


def gram(side: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Compute `W^T W`, its upper blocks only, summed over blocks of rows.

    Args:
        side: `(..., m, n)`.
        dtype: to sum in; that of `side` by default.

    Returns:
        `(..., n, n)`, symmetric to the last bit.

    Cost: 5/8 of a general product; memory beyond the result for a few megabytes of rows.
    """
    m, n = side.shape[-2:]
    width = max(GRAM_WIDTH, -(-n // GRAM_BLOCKS))
    step = max(1, GRAM_ENTRIES // n)
    if n <= width and m <= step:  # a small matrix, whose calls cost as much as its arithmetic
        rows = side.to(dtype or side.dtype)
        return rows.mT @ rows
    total = torch.zeros(*side.shape[:-2], n, n, dtype=dtype or side.dtype, device=side.device)
    for top in range(0, m, step):
        rows = side[..., top : top + step, :].to(total.dtype)
        for left in range(0, n, width):
            total[..., left : left + width, left:] += rows[..., left : left + width].mT @ rows[..., left:]
    for left in range(width, n, width):
        total[..., left : left + width, :left] = total[..., :left, left : left + width].mT
    return total


def orthonormal(block: Tensor) -> Tensor:
    """Find an orthonormal basis of the columns `(..., n, l)`, by Cholesky of their Gram matrix where they are fit."""
    factor, failed = torch.linalg.cholesky_ex(block.mT @ block, upper=True)
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    if bool(failed.any()) or not bool((pivots.amin(-1) > LEAST_PIVOT * pivots.amax(-1)).all()):
        basis: Tensor = torch.linalg.qr(block).Q
    else:
        basis = torch.linalg.solve_triangular(factor, block, upper=True, left=False)
    return basis


def _prefers_gram(m: int, n: int, width: int) -> bool:
    """Multiply-adds of the two ways to run the iteration; the last product of both is alike."""
    return 5 * m * n * n // 8 + 6 * n * n * width < 8 * m * n * width
