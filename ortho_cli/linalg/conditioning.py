"""How well conditioned a covariance is, read from its eigenvalues.

A bare condition number says little: that of a singular covariance is its largest eigenvalue over whatever ridge it was
given. So the ends of the spectrum, the rank, the condition among what is resolved, and the effective rank come with it.
"""

from __future__ import annotations

from math import nan
from typing import NamedTuple

import torch
from torch import Tensor

from ortho_cli.linalg.effective_rank import condition, effective_rank

__all__ = ["Conditioning", "conditioning"]

# Eigenvalues below this share of the largest are rounding, of activations as exact as float32 and of coarser ones.
RESOLVED = 1e-10


class Conditioning(NamedTuple):
    """What the eigenvalues of a covariance say; the condition is infinite for a singular one without a ridge."""

    lambda_max: float
    lambda_min: float
    condition: float
    condition_resolved: float
    rank: float
    effective_rank: float
    ridge: float


def conditioning(covariance: Tensor, ridge: float = 0.0, *, rounding: float = 0.0) -> Conditioning:
    """Describe the spectrum of a covariance.

    Args:
        covariance: `(n, n)`, or `(groups, n, n)` for the diagonal blocks of one; float64 to see small eigenvalues.
        ridge: what is added to every eigenvalue before the condition is taken.
        rounding: relative error of what the covariance was made of, `torch.finfo(dtype).eps`.

    Returns:
        Largest and smallest eigenvalue, the condition with the ridge, that among resolved eigenvalues without it, how
        many these are, and the effective rank. Eigenvalues that are not resolved count as 0. All of it is not a number
        where the covariance is not finite: activations in half precision may overflow, and training goes on.

    Cost: eigenvalues, `4 n^3 / 3` flops a block.

    >>> found = conditioning(torch.diag(torch.tensor([4.0, 4.0, 0.0])), ridge=0.5)
    >>> found.condition, found.condition_resolved, found.rank, round(found.effective_rank, 6)
    (9.0, 1.0, 2.0, 2.0)
    """
    if not bool(covariance.isfinite().all()):
        return Conditioning(nan, nan, nan, nan, nan, nan, ridge)
    values = torch.linalg.eigvalsh(covariance).flatten()
    resolved = values > max(RESOLVED, rounding**2) * values.max()
    values = torch.where(resolved, values, 0).clamp_min(0)
    kept = values[values > 0]
    return Conditioning(
        float(values.max()),
        float(values.min()),
        condition(values + ridge),
        condition(kept) if len(kept) else float("inf"),
        float(len(kept)),
        effective_rank(values),
        ridge,
    )
