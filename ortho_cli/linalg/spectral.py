r"""The best low-rank factors of a matrix, balanced: :math:`U\sqrt S` and :math:`\sqrt S V^T` (spectral initialisation).

Three routes to one result: the singular value decomposition; the eigenvectors of the smaller Gram matrix, in float64
so that squaring the condition costs nothing a float32 weight could show; and a filtered random subspace
(`subspace_iteration.py`). Whatever the route, the product is the projection of W on an orthonormal basis, and its
distance from W is measured, not inferred from singular values that an approximate basis does not have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ortho_cli.errors import NumericsError, check_choice
from ortho_cli.linalg.precision import at_least_float32
from ortho_cli.linalg.subspace_iteration import gram, leading_subspace, prefers_subspace

__all__ = ["METHODS", "SpectralFactors", "frobenius_norm", "relative_error", "singular_values", "spectral_factors"]

METHODS = ("auto", "svd", "gram", "randomized")
# Rows of the residual formed at a time: a block stays in the cache, and a layer of any size costs no copy of it.
BLOCK_ENTRIES = 2**20
# Below this share of ||W||^2 the expanded error has lost more digits to float32 than a report shows.
CANCELLED = 1e-2
# The random subspace is made of float32 products with W^T W: singular values below this share of the largest drown in
# their rounding, unless nothing beyond rounding is left to find.
RESOLVED, ROUNDING = 3e-3, 1e-5


class SpectralFactors(NamedTuple):
    """`W ~ u @ vt`, balanced: `u^T u = vt vt^T = diag(values)`.

    `u (..., m, r)`, `vt (..., r, n)`, `values (..., r)` descending, in the working dtype; `error (...)`, float64, is
    `||W - u vt||_F / ||W||_F`; `method` is the route taken.
    """

    u: Tensor
    vt: Tensor
    values: Tensor
    error: Tensor
    method: str


def spectral_factors(
    weight: Tensor,
    rank: int | Callable[[Tensor], int],
    *,
    method: str = "auto",
    tolerance: float = 0.01,
    seed: int = 0,
) -> SpectralFactors:
    r"""Factor a matrix, or each of a batch, into balanced factors of a given rank with the smallest error.

    Args:
        weight: `(..., m, n)`, any plain float type; half types are computed in float32.
        rank: how many components; more than `min(m, n)` there are not, and only these are returned. Or a rule of
            `ranks.py` that reads it from the singular values.
        method: "svd"; "gram" (as exact for float32 weights, several times faster); "randomized" (leading part only);
            "auto" takes the cheapest that keeps the tolerance.
        tolerance: by how much the squared error may exceed the optimum, as a share of it; 0 rules out "randomized".
        seed: of the random subspace; one seed, one result.

    Returns:
        The factors with their measured error. Signs are fixed: the largest entry of each row of `vt` is positive.

    Raises:
        NumericsError: a non-finite weight.
        UsageError: no such method.

    Cost: "svd" about `20 m n min(m, n)`, "gram" `2 m n k + 9 k^3` in float64 with `k = min(m, n)`, "randomized" a
        dozen products with a matrix of `r` columns.
    Reference: FNL, arXiv:2105.01029, section 3; Eckart-Young.

    >>> factors = spectral_factors(torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]]), 1)
    >>> [round(entry, 5) for entry in factors.u[:, 0].tolist()], round(factors.error.item(), 5)
    ([1.73205, 0.0, 0.0], 0.5547)
    """
    check_choice("method", method, METHODS)
    weight = at_least_float32(weight, "weight")
    norm = frobenius_norm(weight)
    if not bool(torch.isfinite(norm).all()):
        raise NumericsError(
            f"a weight of shape {tuple(weight.shape)} holds values that are not finite",
            hint="the training that wrote it diverged: take an earlier save",
        )
    if isinstance(rank, int) and rank < 1:
        raise ValueError(f"a rank is at least 1, found {rank}")
    tall = weight.shape[-2] >= weight.shape[-1]
    side = weight if tall else weight.mT  # (..., long, short): bases are sought on the short side
    if method == "auto":
        fast = isinstance(rank, int) and prefers_subspace(side.shape[-2], side.shape[-1], rank, tolerance)
        method = "randomized" if fast else "gram"
    if method == "randomized":
        if not isinstance(rank, int):
            raise ValueError("a rank rule reads all singular values: take method 'gram' or 'svd'")
        basis, product = leading_subspace(side, min(rank, side.shape[-1]), seed=seed)
        found = _balance(product, basis, tall)
        error = _error(weight, norm, found)
        if _is_resolved(found.values, error):
            return found._replace(error=error, method=method)
        method = "gram"
    basis = _singular_vectors(side, rank, method)
    found = _balance(side @ basis, basis, tall)
    return found._replace(error=_error(weight, norm, found), method=method)


def singular_values(weight: Tensor) -> Tensor:
    """All singular values, without vectors, for the rank rules.

    Args:
        weight: `(..., m, n)`, any plain float type.

    Returns:
        `(..., min(m, n))` in float64, descending; from the float64 Gram matrix, exact to `1e-8` of the largest.

    >>> singular_values(torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]])).tolist()
    [3.0, 2.0]
    """
    side = at_least_float32(weight, "weight")
    side = side if side.shape[-2] >= side.shape[-1] else side.mT
    eigenvalues: Tensor = torch.linalg.eigvalsh(gram(side, torch.float64))
    return eigenvalues.clamp_min(0).sqrt().flip(-1)


def relative_error(weight: Tensor, u: Tensor, vt: Tensor, norm: Tensor | None = None) -> Tensor:
    """Measure `||W - U VT||_F / ||W||_F` by the residual itself, a block of rows at a time.

    Args:
        weight: `(..., m, n)`.
        u: `(..., m, r)`.
        vt: `(..., r, n)`.
        norm: `||W||_F` where it is known.

    Returns:
        `(...)`, float64; 0 for a weight of zeros.

    Cost: one product `m n r`, no copy of the weight.

    >>> relative_error(torch.tensor([[4.0, 3.0]]), torch.tensor([[2.0]]), torch.tensor([[2.0, 0.0]])).item()
    0.6
    """
    weight = at_least_float32(weight, "weight")
    norm = frobenius_norm(weight) if norm is None else norm
    step = max(1, BLOCK_ENTRIES // weight.shape[-1])
    squares = torch.zeros_like(norm)
    for first in range(0, weight.shape[-2], step):
        rows = slice(first, first + step)
        residual = u[..., rows, :] @ vt
        residual -= weight[..., rows, :]
        squares += frobenius_norm(residual).square()
    return squares.sqrt() / torch.where(norm > 0, norm, 1.0)


def _error(weight: Tensor, norm: Tensor, found: SpectralFactors) -> Tensor:
    r"""The error from :math:`\|W\|^2 - 2 \langle W, U V\rangle + \|U V\|^2`, or where that cancels, from the residual.

    `U` is `W` times a basis, so the middle term is known. The plain :math:`\|W\|^2 - \sum s^2` would miss what the
    basis lacks in orthogonality.
    """
    u, vt, values = found.u, found.vt, found.values
    along = values.double().square().sum(-1)
    both = ((u.mT @ u).double() * (vt @ vt.mT)).sum((-2, -1))
    share = (norm.square() - 2 * along + both) / torch.where(norm > 0, norm, 1.0).square()
    return share.sqrt() if bool((share > CANCELLED).all()) else relative_error(weight, u, vt, norm)


def _is_resolved(values: Tensor, error: Tensor) -> bool:
    """Whether float32 products could see the last component beside the first, or all of the weight was found."""
    seen = values[..., -1] > RESOLVED * values[..., 0]
    return bool((seen | (error < ROUNDING)).all())


def frobenius_norm(matrix: Tensor) -> Tensor:
    """`||.||_F` in float64, without a copy in it: exact to float32 rounding of single rows."""
    rows: Tensor = torch.linalg.vector_norm(matrix, dim=-1)
    norm: Tensor = torch.linalg.vector_norm(rows.double(), dim=-1)
    return norm


def _singular_vectors(side: Tensor, rank: int | Callable[[Tensor], int], method: str) -> Tensor:
    """Orthonormal `(..., short, r)`: the leading right singular vectors of `side`, in descending order."""
    if method == "svd":
        _, values, vectors_t = torch.linalg.svd(side, full_matrices=False)
        vectors = vectors_t.mT
    else:
        squares, vectors = torch.linalg.eigh(gram(side, torch.float64))
        values, vectors = squares.clamp_min(0).sqrt().flip(-1), vectors.flip(-1)
    leading: Tensor = vectors[..., : rank if isinstance(rank, int) else rank(values)].to(side.dtype)
    return leading


def _balance(product: Tensor, basis: Tensor, tall: bool) -> SpectralFactors:
    """Share the length of each component of `product basis^T` evenly, signs fixed; a component of zero is zero."""
    values = torch.linalg.vector_norm(product, dim=-2)
    root = values.sqrt()
    rows = basis if tall else product  # what VT is made of
    largest = rows.gather(-2, rows.abs().argmax(-2, keepdim=True)).squeeze(-2)
    sign = torch.where(largest < 0, -1, 1).to(root.dtype)
    long = product * (sign / torch.where(root > 0, root, 1))[..., None, :]
    short = basis * (sign * root)[..., None, :]
    u, vt = (long, short.mT) if tall else (short, long.mT)
    return SpectralFactors(u.contiguous(), vt.contiguous(), values, values.new_zeros(()), "")
