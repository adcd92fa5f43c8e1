r"""The nearest matrix with orthonormal columns: the polar factor `P` of `A = P H`, `H` symmetric and semidefinite.

With the thin SVD `A = U S V^T` it is `P = U V^T`: unique where A has full column rank, blind to the scale of A, and
free of the signs and the order that U and V have. What A does not resolve (singular values below `RESOLVED` of the
largest, or below the rounding of a half type) is left out, and P is a partial isometry: an isometry of a smaller space,
as unique as before, where completing it would make up directions that are not in A.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import frexp, isfinite, ldexp, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from ortho_cli.errors import NumericsError, TargetError, check_choice
from ortho_cli.linalg.polar_express import POLISHED, isometry_defect, polar_express
from ortho_cli.linalg.precision import at_least_float32
from ortho_cli.linalg.spectral import frobenius_norm
from ortho_cli.linalg.subspace_iteration import gram

__all__ = [
    "METHODS", "RESOLVED", "Polar", "RightSpectrum", "Tall", "isometry", "polar_factor", "right_spectrum",
    "tall_at_unit_scale", "tall_matrix",
]  # fmt: skip

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
SMALL = 1e-9  # from here to its inverse the squares of the largest entries are far from the ends of float32
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


class Tall(NamedTuple):
    """`matrix * scale` is a weight or its transpose; singular values up to `rounding` of `matrix` may be rounding."""

    matrix: Tensor
    scale: float
    rounding: float


class RightSpectrum(NamedTuple):
    """`values (n,)`, descending, and right singular `vectors (n, n)` of a tall matrix, and its `squared` `A^T A`.

    All are float64, or float32 for a float32 matrix of mild condition. Values up to `rounding` are not resolved.
    """

    values: Tensor
    vectors: Tensor
    squared: Tensor
    rounding: float = 0.0

    @property
    def rank(self) -> int:
        """Singular values that are resolved."""
        return _resolved(self.values, self.rounding)

    def within(self, condition: float) -> bool:
        """Whether the condition is at most this."""
        largest, smallest = float(self.values[0]), float(self.values[-1])
        return smallest * condition >= largest > 0


def polar_factor(matrix: Tensor, *, method: str = "auto", stored: torch.dtype | None = None) -> Polar:
    """Find the nearest matrix with orthonormal columns: keep the directions of a weight, drop its strengths.

    Args:
        matrix: `(m, n)`, any plain float type; half types are computed in float32.
        method: "svd" in float64; "gram", the eigenvectors of `A^T A` in the precision it needs, faster;
            "polar-express", matrix products only, for accelerators; "auto": on an accelerator products where the matrix
            is large and its condition below 1e3, else "gram". "polar-express" completes what the others leave out.
        stored: the type whose rounding the values have, where that is coarser than the matrix's own.

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
    tall, scale, rounding = tall_at_unit_scale(matrix, stored)
    if method == "polar-express" or (method == "auto" and _prefers_products(tall)):
        made = _iterated(tall)
        if method == "polar-express" or (_is_exact(made) and made.sigma_min > rounding):
            return _like(made, matrix, scale)
    if method == "svd":
        left, values, right = torch.linalg.svd(tall.double(), full_matrices=False)
        rank = _resolved(values, rounding)
        factor = (left[:, :rank] @ right[:rank]).to(tall.dtype)
    else:
        spectrum = right_spectrum(tall, rounding)
        values, rank, factor = spectrum.values, spectrum.rank, isometry(tall, spectrum)
    taken = "svd" if method == "svd" else "gram"
    found = Polar(factor, float(values[-1]), float(values[0]), isometry_defect(factor), taken, rank)
    return _like(found, matrix, scale)


def tall_at_unit_scale(matrix: Tensor, stored: torch.dtype | None = None) -> Tall:
    """Make a matrix tall, its squares safe from the ends of float32, and say how much of it may be rounding.

    Args:
        matrix: any plain float type.
        stored: the type whose rounding its values have; its own by default.

    Returns:
        A view where the entries are of an ordinary size, else a copy over a power of two.

    Raises:
        TargetError: no matrix, or an empty one.
        NumericsError: a value that is not finite.

    Cost: one pass; for half types two.
    Reference: the largest singular value of random entries, Davidson and Szarek 2001, theorem II.13.

    >>> tall_at_unit_scale(torch.tensor([[0.0, 2.0**-70]]))
    Tall(matrix=tensor([[0.],
            [1.]]), scale=8.470329472543003e-22, rounding=0.0)
    """
    tall = tall_matrix(matrix)
    largest = float(torch.linalg.vector_norm(tall, float("inf")))
    if not isfinite(largest):
        raise _not_finite(tall)
    scale = 1.0 if not largest or SMALL < largest < 1 / SMALL else ldexp(1.0, frexp(largest)[1] - 1)
    tall = tall if scale == 1.0 else tall / scale
    kind = torch.finfo(stored or matrix.dtype)
    if kind.eps < RESOLVED:
        return Tall(tall, scale, 0.0)
    rows, cols = tall.shape
    typical = max(float(frobenius_norm(tall)) / sqrt(rows * cols), kind.smallest_normal / scale)
    return Tall(tall, scale, kind.eps / 2 * typical * (sqrt(rows) + sqrt(cols)))  # half an eps is the most an entry has


def _resolved(values: Tensor, rounding: float) -> int:
    """How many of the descending singular values tell of more than rounding."""
    listed = values.tolist()
    least = max(RESOLVED * listed[0], rounding)
    return sum(value > least for value in listed)


def tall_matrix(matrix: Tensor) -> Tensor:
    """The matrix, or its transpose where it is wide, in at least float32.

    Raises:
        TargetError: no matrix, or an empty one.
    """
    if matrix.ndim != 2 or not matrix.numel():
        raise TargetError(f"a matrix has two dimensions and some entries, found shape {tuple(matrix.shape)}")
    matrix = at_least_float32(matrix, "matrix")
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT


def right_spectrum(tall: Tensor, rounding: float = 0.0) -> RightSpectrum:
    """Singular values and right singular vectors of a tall matrix `(m, n)`, from its Gram matrix.

    Args:
        tall: the matrix.
        rounding: singular values up to this one are not resolved.

    Raises:
        NumericsError: a value that is not finite.

    Cost: `m n^2 + 9 n^3` flops, in float64 unless the condition is mild.

    >>> right_spectrum(torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]])).values.tolist()
    [3.0, 2.0]
    """
    rows, cols = tall.shape
    if tall.dtype == torch.float32 and cols >= LARGE_SIDE and rows >= TALL * cols:
        squared = gram(tall)
        found = _spectrum(squared, rounding) if _may_be_mild(squared) else None
        if found is not None and found.within(MILD):
            return found
    squared = gram(tall, torch.float64)
    if not isfinite(squared.trace()):
        raise _not_finite(tall)
    return _spectrum(squared, rounding)


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


def _spectrum(squared: Tensor, rounding: float) -> RightSpectrum:
    squares, vectors = torch.linalg.eigh(squared)
    return RightSpectrum(squares.clamp_min(0).sqrt().flip(-1), vectors.flip(-1), squared, rounding)


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
    found = polar_express(tall)
    rank = round(float(found.factor.square().sum(dtype=torch.float64)))
    return Polar(found.factor, found.sigma_min, found.sigma_max, found.error, "polar-express", rank)


def _is_exact(found: Polar) -> bool:
    """Whether the iteration found the factor as exactly as float64 would have, for all that float32 can tell."""
    polished = 2 * POLISHED * torch.finfo(found.factor.dtype).eps
    return found.sigma_min > ITERATED * found.sigma_max and found.error < polished


def _like(found: Polar, matrix: Tensor, scale: float) -> Polar:
    """The factor turned as the matrix is, and the singular values at its scale."""
    factor = found.factor if found.factor.shape == matrix.shape else found.factor.mT
    return replace(found, factor=factor, sigma_min=found.sigma_min * scale, sigma_max=found.sigma_max * scale)
