r"""Low-rank factors that keep what a layer does to its inputs: the smallest :math:`\|(W - U V^T) X\|_F`.

With the Gram matrix :math:`G = X X^T = L L^T` of the inputs this is the best approximation of :math:`W L`, its right
factor multiplied by :math:`L^{-1}`. The inputs themselves are not needed, only G, which grows with no number of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ortho_cli.errors import NumericsError
from ortho_cli.linalg.precision import at_least_float32
from ortho_cli.linalg.product import rebalance
from ortho_cli.linalg.spectral import BLOCK_ENTRIES, singular_values, spectral_factors

__all__ = ["DAMPING", "WhitenedFactors", "activation_error", "whitened_factors", "whitened_values"]

# Share of the mean diagonal added to G: directions that the samples hardly show keep some weight, and the Cholesky
# factor exists however few samples there are. GPTQ's value.
DAMPING = 0.01


class WhitenedFactors(NamedTuple):
    """`W ~ u @ vt`, balanced; `values` are the singular values of the product, descending, in the working dtype."""

    u: Tensor
    vt: Tensor
    values: Tensor


def whitened_factors(
    weight: Tensor, gram: Tensor, rank: int | Callable[[Tensor], int], *, damping: float = DAMPING
) -> WhitenedFactors:
    r"""Factor a weight so that its outputs on given inputs change least.

    Args:
        weight: `(m, n)`, any plain float type; computed in float64.
        gram: `(n, n)`, the sum of `x x^T` over the inputs, in any scale.
        rank: how many components, at most `min(m, n)`; or a rule that reads it from the whitened singular values.
        damping: share of G's mean diagonal that is added to its diagonal.

    Returns:
        Balanced factors in at least float32.

    Raises:
        NumericsError: a weight or a Gram matrix that is not finite.

    Cost: `n^3 / 3 + 2 m n^2` and a decomposition of `(m, n)`, in float64.
    Reference: SVD-LLM, arXiv:2403.07378.

    >>> inputs = torch.tensor([[1.0, 0.0], [0.0, 0.01]])  # the second feature hardly ever occurs
    >>> factors = whitened_factors(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), inputs @ inputs.T, 1, damping=0.0)
    >>> (factors.u @ factors.vt).round(decimals=3).tolist()
    [[1.0, 0.0], [0.0, 0.0]]
    """
    root = _root(gram, damping)
    factors = spectral_factors(weight.double() @ root, rank, method="gram", tolerance=0.0)
    right = torch.linalg.solve_triangular(root, factors.vt, upper=False, left=False)
    u, vt = rebalance(factors.u, right)
    values = torch.linalg.vector_norm(u, dim=-2).square()
    working = at_least_float32(weight, "weight").dtype
    return WhitenedFactors(u.to(working), vt.to(working), values.to(working))


def whitened_values(weight: Tensor, gram: Tensor, *, damping: float = DAMPING) -> Tensor:
    """All singular values of `W L`: what each component contributes to the outputs.

    >>> whitened_values(torch.eye(2), torch.tensor([[4.0, 0.0], [0.0, 1.0]]), damping=0.0).tolist()
    [2.0, 1.0]
    """
    return singular_values(weight.double() @ _root(gram, damping))


def activation_error(weight: Tensor, u: Tensor, vt: Tensor, gram: Tensor) -> float:
    r"""Measure `||(W - U VT) X||_F / ||W X||_F` from the Gram matrix of X, by blocks of rows.

    Args:
        weight: `(m, n)`.
        u: `(m, r)`.
        vt: `(r, n)`.
        gram: `(n, n)`; that of inputs the factors were not made for tells the most.

    Returns:
        The error; 0 where the layer answers with zeros.

    Cost: `2 m n^2 + m n r`.

    >>> activation_error(torch.eye(2), torch.zeros(2, 1), torch.zeros(1, 2), torch.eye(2))
    1.0
    """
    gram = gram.double()
    lost = whole = 0.0
    step = max(1, BLOCK_ENTRIES // weight.shape[1])
    for first in range(0, weight.shape[0], step):
        rows = slice(first, first + step)
        block = weight[rows].double()
        residual = block - u[rows].double() @ vt.double()
        lost += float(((residual @ gram) * residual).sum())
        whole += float(((block @ gram) * block).sum())
    return (max(lost, 0.0) / whole) ** 0.5 if whole > 0 else 0.0


def _root(gram: Tensor, damping: float) -> Tensor:
    """Lower triangular `L` with `L L^T = G` and its damping."""
    gram = gram.double()
    mean = gram.diagonal().mean()
    if not bool(torch.isfinite(gram).all()):
        raise NumericsError("the Gram matrix of a layer's inputs is not finite", hint="check the model and the data")
    if mean <= 0:  # a layer that was never reached, or reads only zeros: every direction counts alike
        return torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    # In rounding, a Gram matrix of few inputs may be barely indefinite; then the least damping that helps.
    for extra in (0.0, 1e-12, 1e-10, 1e-8):
        damped = gram + (damping + extra) * mean * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        root, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            return root  # type: ignore[no-any-return]
    raise NumericsError("the Gram matrix of a layer's inputs is not positive", hint="give more samples")
