r"""Square roots and inverse square roots of symmetric positive definite matrices, in batches, with their gradients.

With :math:`M = Q \Lambda Q^T` the gradient of a root is :math:`Q (K \circ Q^T G Q) Q^T` and K, the divided differences
of the root, has a closed form: :math:`1 / (s_i + s_j)` with :math:`s = \sqrt\lambda`, and
:math:`-1 / (s_i s_j (s_i + s_j))` for the inverse root. Nothing is divided by a difference, so equal eigenvalues are as
safe as any; differentiating `torch.linalg.eigh` itself divides by :math:`\lambda_i - \lambda_j`.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ortho_cli.errors import NumericsError, TargetError, check_choice
from ortho_cli.linalg.precision import at_least_float32

__all__ = ["ITERATIONS", "METHODS", "inverse_sqrtm", "sqrtm"]

METHODS = ("eigh", "newton-schulz", "mpa")
# Each Newton-Schulz step makes the smallest singular values 1.5 times larger, until they are near 1: so many steps
# reach a condition of 1e5 at 64 x 64.
ITERATIONS = 20
# The [5/5] Pade approximant of sqrt(1 - z) at 0, all dyadic fractions. At z = 1 it is 1/11 where the root is 0.
PADE_P = (1.0, -2.75, 2.75, -1.203125, 0.21484375, -0.0107421875)
PADE_Q = (1.0, -2.25, 1.75, -0.546875, 0.05859375, -0.0009765625)
LYAPUNOV_STEPS = 8  # 1.5^8 = 25.6 lifts the approximant's floor of 1/11 to 1


def sqrtm(matrix: Tensor, *, ridge: float = 0.0, method: str = "eigh", iterations: int = ITERATIONS) -> Tensor:
    r"""Take the symmetric square root of symmetric positive semidefinite matrices.

    Args:
        matrix: `(..., n, n)`, symmetric, any plain float type; half types are computed in float32.
        ridge: added to the diagonal first. "eigh" uses that no eigenvalue is below it, whatever rounding says.
        method: "eigh", exact; "newton-schulz", matrix products only, exact up to the condition that `iterations` reach;
            "mpa", the Pade approximant with a Lyapunov gradient, which never falls below `sqrt(||M||_F) / 11`: no
            accurate root, but what results were published with.
        iterations: of "newton-schulz".

    Returns:
        `(..., n, n)`, in at least float32; differentiable once.

    Raises:
        TargetError: not square matrices.
        NumericsError: no eigenvalues were found, as of values that are not finite. Not every LAPACK looks, and the
            other methods do not: their roots of such values are not finite.
        UsageError: no such method.

    Cost: "eigh" about `11 n^3` multiply-adds, and `4 n^3` in backward; "mpa" `6 n^3` and `48 n^3`.
    Reference: Higham, "Functions of Matrices", 2008, chapter 6; Song et al., arXiv:2201.08663 (MPA-Lya).

    >>> sqrtm(torch.tensor([[4.0, 0.0], [0.0, 9.0]])).tolist()
    [[2.0, 0.0], [0.0, 3.0]]
    """
    return _root(matrix, ridge, method, iterations, False)


def inverse_sqrtm(matrix: Tensor, *, ridge: float = 0.0, method: str = "eigh", iterations: int = ITERATIONS) -> Tensor:
    r"""Take the symmetric inverse square root of symmetric positive definite matrices: what whitens a covariance.

    Arguments, returns and errors are those of :func:`sqrtm`.

    Raises:
        NumericsError: also of a singular matrix without a ridge, which has none.

    Cost: as :func:`sqrtm`; `2 n^3` more each way for "mpa" and in backward for "newton-schulz".

    >>> inverse_sqrtm(torch.tensor([[3.0, 0.0], [0.0, 0.0]]), ridge=1.0).tolist()
    [[0.5, 0.0], [0.0, 1.0]]
    """
    return _root(matrix, ridge, method, iterations, True)


def _root(matrix: Tensor, ridge: float, method: str, iterations: int, inverse: bool) -> Tensor:
    check_choice("method", method, METHODS)
    if matrix.ndim < 2 or matrix.shape[-2] != matrix.shape[-1] or not matrix.shape[-1]:
        raise TargetError(f"a root is of square matrices, found shape {tuple(matrix.shape)}")
    matrix = at_least_float32(matrix, "matrix")
    root: Tensor
    try:
        if method == "eigh":
            root = _Spectral.apply(matrix, ridge, inverse)  # type: ignore[no-untyped-call]
        else:
            matrix = matrix + ridge * _eye(matrix) if ridge else matrix
            steps = iterations if method == "newton-schulz" else None
            root = _Iterated.apply(matrix, steps, inverse)  # type: ignore[no-untyped-call]
    except LinAlgError as error:
        raise NumericsError(
            f"no eigenvalues of a matrix of shape {tuple(matrix.shape)} were found: is it finite?"
        ) from error
    return root


class _Spectral(torch.autograd.Function):
    """The root from eigenvalues, its gradient from their divided differences."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, ridge: float, inverse: bool) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        roots = (values.clamp_min(0) + ridge).sqrt()
        if inverse and not ridge and not bool((roots > 0).all()):
            raise NumericsError(
                "a singular matrix has no inverse root", hint="add a ridge, or give more samples than dimensions"
            )
        ctx.inverse = inverse
        ctx.save_for_backward(roots, vectors)
        found: Tensor = (vectors * (roots.reciprocal() if inverse else roots)[..., None, :]) @ vectors.mT
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        roots, vectors = ctx.saved_tensors
        rows, cols = roots[..., :, None], roots[..., None, :]
        # A direction of zeros has no derivative: the finite one of the smallest normal number stands for it.
        sums = (rows + cols).clamp_min(sqrt(torch.finfo(roots.dtype).tiny))
        kernel = -1 / (sums * rows * cols) if ctx.inverse else 1 / sums
        return vectors @ (vectors.mT @ gradient @ vectors * kernel) @ vectors.mT, None, None


class _Iterated(torch.autograd.Function):
    """The root from products and solves, its gradient by iterating for `X Y + Y X = G`."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, iterations: int | None, inverse: bool) -> Tensor:
        norm = torch.linalg.matrix_norm(matrix, keepdim=True)
        if iterations is None:
            root = _pade(matrix, norm)
            other = torch.cholesky_inverse(_factor(root)) if inverse else root
        else:
            root, other = _newton_schulz(matrix, norm, iterations)
        ctx.steps, ctx.inverse = iterations or LYAPUNOV_STEPS, inverse
        ctx.save_for_backward(root, other, norm)
        return other if inverse else root

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        root, other, norm = ctx.saved_tensors
        if ctx.inverse:
            gradient = -(other.mT @ gradient @ other.mT)
        return _lyapunov(root / norm.sqrt(), gradient / norm.sqrt(), ctx.steps), None, None


def _pade(matrix: Tensor, norm: Tensor) -> Tensor:
    z = _eye(matrix) - matrix / norm
    square = z @ z
    fourth = square @ square
    powers = (z, square, square @ z, fourth, fourth @ z)
    top, bottom = (
        sum((factor * power for factor, power in zip(factors[1:], powers, strict=True)), factors[0] * _eye(matrix))
        for factors in (PADE_P, PADE_Q)
    )
    return norm.sqrt() * torch.cholesky_solve(top, _factor(bottom))


def _factor(positive: Tensor) -> Tensor:
    """Cholesky's factor, of nan where there is none. LU would do, but MKL's may hang on many matrices of side 256."""
    factor: Tensor = torch.linalg.cholesky_ex(positive).L
    return factor


def _newton_schulz(matrix: Tensor, norm: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """The coupled iteration: root and inverse root."""
    eye = _eye(matrix)
    root, inverse = matrix / norm, eye.expand_as(matrix)
    for _ in range(iterations):
        step = 1.5 * eye - 0.5 * (inverse @ root)
        root, inverse = root @ step, step @ inverse
    return norm.sqrt() * root, inverse / norm.sqrt()


def _lyapunov(scaled: Tensor, right: Tensor, steps: int) -> Tensor:
    """Solve `X Y + Y X = G`, both divided by the same scale, which makes the spectral norm of X at most 1."""
    eye = _eye(scaled)
    for _ in range(steps):
        square = scaled @ scaled
        rest = 3 * eye - square
        right = 0.5 * (right @ rest - square @ right + scaled @ right @ scaled)
        scaled = 0.5 * (scaled @ rest)
    return 0.5 * right


def _eye(matrix: Tensor) -> Tensor:
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
