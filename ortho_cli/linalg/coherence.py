r"""How far the rows or columns of a matrix are from orthonormal, all read from their Gram matrix `G`."""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["GramMeasures", "gram_measures", "spread"]


class GramMeasures(NamedTuple):
    r"""What the Gram matrix `G (k, k)` of `k` vectors says of them.

    Attributes:
        residual: :math:`\|G - I\|_F`, soft orthogonality's distance.
        normalized: the same over :math:`\sqrt k`: the root mean square of :math:`\sigma_i^2 - 1`.
        scale_free: 0 for orthogonal vectors of equal length, whatever it is; 1 where all are parallel. None for
            vectors of zeros.
        coherence: the largest :math:`|\cos|` of the angle between two of them (mutual coherence).
        zeros: how many have no length, and so no angle.
    """

    residual: float
    normalized: float
    scale_free: float | None
    coherence: float
    zeros: int


def gram_measures(gram: Tensor) -> GramMeasures:
    r"""Measure vectors by their Gram matrix, which is overwritten.

    `G - I` is formed as such: the expanded :math:`\|G\|^2 - 2 tr G + k` loses digits near the optimum.

    Args:
        gram: `G (k, k)`, symmetric, best in float64.

    Cost: four passes over `G`, no copy of it but the cosines.
    Reference: soft orthogonality, Bansal et al., arXiv:1810.09102; mutual coherence, Donoho and Huo 2001.

    >>> found = gram_measures(torch.tensor([[4.0, 0.0], [0.0, 4.0]]))
    >>> round(found.normalized, 6), found.scale_free, found.coherence
    (3.0, 0.0, 0.0)
    >>> gram_measures(torch.ones(2, 2))[1:]
    (1.0, 1.0, 1.0, 0)
    """
    count, squares = gram.shape[0], gram.diagonal().clone()
    gram.diagonal().sub_(1)
    residual = float(torch.linalg.vector_norm(gram, dtype=torch.float64))
    mean = float(squares.double().mean())
    gram.diagonal().copy_(squares - mean)
    excess = float(torch.linalg.vector_norm(gram, dtype=torch.float64))
    scale_free = spread((excess / mean) ** 2, 1, count) if mean > 0 else None
    gram.fill_diagonal_(0)
    inverse = torch.where(squares > 0, squares.rsqrt(), 0.0)
    cosines = gram.mul_(inverse).mul_(inverse[:, None]).abs_()
    return GramMeasures(
        residual, residual / sqrt(count), scale_free, min(float(cosines.max()), 1.0), int((squares <= 0).sum())
    )


def spread(penalty: float, groups: int, size: int) -> float:
    r"""Bring :math:`\sum_b \|G_b / \overline{g_b} - I\|_F^2` of `groups` Gram matrices `(size, size)` to `[0, 1]`.

    Of one of them it is at most `size (size - 1)`, which it is at rank one.

    >>> spread(2.0, 1, 2), spread(0.0, 4, 1)
    (1.0, 0.0)
    """
    most = groups * size * (size - 1)
    return sqrt(penalty / most) if most else 0.0
