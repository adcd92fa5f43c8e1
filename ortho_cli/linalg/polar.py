r"""The nearest matrix with orthonormal columns: the polar factor `P` of `A = P H`, `H` symmetric and semidefinite.

With the thin SVD `A = U S V^T` it is `P = U V^T`: unique where A has full column rank, blind to the scale of A, and
free of the signs and the order that U and V have. What A does not resolve (singular values below `RESOLVED` of the
largest) is left out, and P is a partial isometry: an isometry of a smaller space, as unique as before, where completing
it would make up directions that are not in A.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from ortho_cli.errors import NumericsError, TargetError, check_choice
from ortho_cli.linalg.polar_express import POLISHED, isometry_defect, polar_express
from ortho_cli.linalg.precision import at_least_float32
from ortho_cli.linalg.subspace_iteration import gram

__all__ = ["METHODS", "RESOLVED", "Polar", "RightSpectrum", "isometry", "polar_factor", "right_spectrum", "tall_matrix"]

METHODS = ("auto", "svd", "gram", "polar-express")
# Up to a condition of 1e5 (and a little, for rounding) the float64 Gram matrix gives the factor of a float32 weight to
# 2e-7; beyond it no one should call what is found a basis: it is mostly the rounding of the weight.
RESOLVED = 0.9e-5
# A float32 Gram matrix loses the square of the condition: up to this one stability is exact to 5e-7. Only a matrix this
# much taller than wide has a chance of it, square ones being worse the larger they are.
MILD, TALL = 20.0, 1.2
# A product in float32 loses the condition itself, to rounding that does not add up: to 1e-7 up to this one.
ROUNDED = 1e3
# The iteration runs in the weight's own precision: to 1e-6 up to this condition.
ITERATED = 1e-3
# From this side on there is time to be saved: on an accelerator by products instead of an eigenproblem, on a CPU by
# float32.
LARGE_SIDE = 128
ROW_ENTRIES = 2**21  # rows taken at a time, so that no copy of the whole in float64 is made


@dataclass(frozen=True)
class Polar:
    """The polar factor of a matrix, and how far it can be trusted.

    Attributes:
        factor: of the matrix's shape, at least float32; orthonormal columns (rows of a wide matrix) for full rank.
        sigma_min: smallest singular value; estimated to a few percent by "polar-express", as is the next.
        sigma_max: largest singular value.
        error: how far `P^T P` is from a projection, the root of the mean square over a few random vectors.
        method: the route taken.
        rank: directions that are resolved; `min(m, n)` for full rank.
    """

    factor: Tensor
    sigma_min: float
    sigma_max: float
    error: float
    method: str
    rank: int


class RightSpectrum(NamedTuple):
    """`values (n,)`, descending, and right singular `vectors (n, n)` of a tall matrix, and its `squared` `A^T A`.

    All are float64, or float32 for a float32 matrix of mild condition.
    """

    values: Tensor
    vectors: Tensor
    squared: Tensor

    @property
    def rank(self) -> int:
        """Singular values above `RESOLVED` of the largest."""
        values = self.values.tolist()
        return sum(value > RESOLVED * values[0] for value in values)

    def within(self, condition: float) -> bool:
        """Whether the condition is at most this."""
        largest, smallest = float(self.values[0]), float(self.values[-1])
        return smallest * condition >= largest > 0


def polar_factor(matrix: Tensor, *, method: str = "auto") -> Polar:
    """Find the nearest matrix with orthonormal columns: keep the directions of a weight, drop its strengths.

    Args:
        matrix: `(m, n)`, any plain float type; half types are computed in float32.
        method: "svd" in float64; "gram", the eigenvectors of `A^T A` in the precision it needs, faster;
            "polar-express", matrix products only, for accelerators; "auto": on an accelerator products where the matrix
            is large and its condition below 1e3, else "gram".

    Raises:
        TargetError: no matrix, or an empty one.
        NumericsError: a value that is not finite.
        UsageError: no such method.

    Cost: "gram" `4 m n k + 11 k^3` flops with `k = min(m, n)`; "svd" about `6 m n k + 20 k^3`;
        "polar-express" about `40 m n k`.
    Reference: Higham, "Functions of Matrices", 2008, chapter 8; for its use, OIALR, arXiv:2401.08505, section 3.

    >>> found = polar_factor(torch.tensor([[3.0, 0.0], [0.0, -2.0], [0.0, 0.0]]))
    >>> found.factor.tolist(), found.sigma_max, found.rank
    ([[1.0, 0.0], [0.0, -1.0], [0.0, 0.0]], 3.0, 2)
    """
    check_choice("method", method, METHODS)
    tall = tall_matrix(matrix)
    if method == "polar-express" or (method == "auto" and _prefers_products(tall)):
        made = _iterated(tall)
        if method == "polar-express" or _is_exact(made):
            return _like(made, matrix)
    spectrum = None if method == "svd" else right_spectrum(tall)
    if spectrum is None:
        if not bool(tall.isfinite().all()):
            raise _not_finite(tall)
        left, values, right = torch.linalg.svd(tall.double(), full_matrices=False)
        rank = int((values > RESOLVED * values[0]).sum())
        factor = (left[:, :rank] @ right[:rank]).to(tall.dtype)
    else:
        values, rank, factor = spectrum.values, spectrum.rank, isometry(tall, spectrum)
    taken = "svd" if spectrum is None else "gram"
    found = Polar(factor, float(values[-1]), float(values[0]), isometry_defect(factor), taken, rank)
    return _like(found, matrix)


def tall_matrix(matrix: Tensor) -> Tensor:
    """The matrix, or its transpose where it is wide, in at least float32.

    Raises:
        TargetError: no matrix, or an empty one.
    """
    if matrix.ndim != 2 or not matrix.numel():
        raise TargetError(f"a matrix has two dimensions and some entries, found shape {tuple(matrix.shape)}")
    matrix = at_least_float32(matrix, "matrix")
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT


def right_spectrum(tall: Tensor) -> RightSpectrum:
    """Singular values and right singular vectors of a tall matrix `(m, n)`, from its Gram matrix.

    Raises:
        NumericsError: a value that is not finite.

    Cost: `m n^2 + 9 n^3` flops, in float64 unless the condition is mild.

    >>> right_spectrum(torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]])).values.tolist()
    [3.0, 2.0]
    """
    rows, cols = tall.shape
    if tall.dtype == torch.float32 and cols >= LARGE_SIDE and rows >= TALL * cols:
        squared = gram(tall)
        found = _spectrum(squared) if _may_be_mild(squared) else None
        if found is not None and found.within(MILD):
            return found
    squared = gram(tall, torch.float64)
    if not isfinite(squared.trace()):
        raise _not_finite(tall)
    return _spectrum(squared)


def _not_finite(matrix: Tensor) -> NumericsError:
    return NumericsError(
        f"a matrix of shape {tuple(matrix.shape)} holds values that are not finite",
        hint="the training that wrote it diverged: take an earlier save",
    )


def _may_be_mild(squared: Tensor) -> bool:
    """Whether the condition may be `MILD`: pivots of Cholesky's factor, which differ by less, do not rule it out."""
    if not bool(squared.diagonal().isfinite().all()):
        return False
    triangle, failed = torch.linalg.cholesky_ex(squared)
    pivots = triangle.diagonal()
    return not bool(failed) and bool(pivots.max() <= MILD * pivots.min())


def _spectrum(squared: Tensor) -> RightSpectrum:
    squares, vectors = torch.linalg.eigh(squared)
    return RightSpectrum(squares.clamp_min(0).sqrt().flip(-1), vectors.flip(-1), squared)


def isometry(tall: Tensor, spectrum: RightSpectrum) -> Tensor:
    """The polar factor `A V S^-1 V^T` of a tall matrix, in its dtype; directions that are not resolved are left out.

    Cost: `2 m n^2 + 2 n^3` flops, the first in float64 where the condition asks for it.
    """
    rank = spectrum.rank
    kept = spectrum.vectors[:, :rank]
    root = (kept / spectrum.values[:rank]) @ kept.mT  # the inverse of H
    if spectrum.within(ROUNDED):
        return tall @ root.to(tall.dtype)
    factor = torch.empty_like(tall, memory_format=torch.contiguous_format)
    for rows in _row_blocks(tall):
        factor[rows] = (tall[rows].double() @ root).to(tall.dtype)
    return factor


def _row_blocks(tall: Tensor) -> list[slice]:
    step = max(1, ROW_ENTRIES // tall.shape[1])
    return [slice(start, start + step) for start in range(0, tall.shape[0], step)]


def _prefers_products(tall: Tensor) -> bool:
    return tall.device.type != "cpu" and tall.shape[1] >= LARGE_SIDE


def _iterated(tall: Tensor) -> Polar:
    if not bool(tall.isfinite().all()):
        raise _not_finite(tall)
    found = polar_express(tall)
    rank = round(float(found.factor.square().sum(dtype=torch.float64)))
    return Polar(found.factor, found.sigma_min, found.sigma_max, found.error, "polar-express", rank)


def _is_exact(found: Polar) -> bool:
    """Whether the iteration found the factor as exactly as float64 would have, for all that float32 can tell."""
    polished = 2 * POLISHED * torch.finfo(found.factor.dtype).eps
    return found.sigma_min > ITERATED * found.sigma_max and found.error < polished


def _like(found: Polar, matrix: Tensor) -> Polar:
    """The factor turned as the matrix is."""
    if found.factor.shape == matrix.shape:
        return found
    return Polar(found.factor.mT, found.sigma_min, found.sigma_max, found.error, found.method, found.rank)
