r"""How many dimensions a matrix really uses, read from its singular values.

All are 1 for a matrix of rank one and `k` for an orthogonal one; they differ in how much the small values count.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["condition", "effective_rank", "stable_rank"]


def stable_rank(values: Tensor) -> float:
    r"""Compute :math:`\|W\|_F^2 / \|W\|_2^2`, which small singular values hardly move.

    Args:
        values: all singular values, any order; of several matrices together, flattened.

    Returns:
        In [1, k]; 0 for a matrix of zeros.

    >>> stable_rank(torch.tensor([2.0, 2.0, 0.0])), stable_rank(torch.zeros(2))
    (2.0, 0.0)
    """
    squares = values.double().square()
    largest = float(squares.max())
    return float(squares.sum()) / largest if largest else 0.0


def effective_rank(values: Tensor) -> float:
    r"""Compute the exponential of the entropy of the normalised singular values.

    Returns:
        In [1, k]; 0 for a matrix of zeros.

    Reference: Roy and Vetterli, EUSIPCO 2007.

    >>> round(effective_rank(torch.tensor([3.0, 3.0, 3.0, 0.0])), 6)
    3.0
    """
    values = values.double()
    total = values.sum()
    if not total > 0:
        return 0.0
    shares = values / total
    return float(torch.special.entr(shares).sum().exp())


def condition(values: Tensor) -> float:
    """Compute the largest over the smallest singular value; infinite for a singular matrix.

    >>> condition(torch.tensor([4.0, 2.0])), condition(torch.tensor([1.0, 0.0]))
    (2.0, inf)
    """
    smallest = float(values.min())
    return float(values.max()) / smallest if smallest > 0 else float("inf")
