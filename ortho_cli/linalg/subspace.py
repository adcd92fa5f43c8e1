r"""How far the basis of a weight has moved between two checkpoints, and how far what the basis is mixed by.

The basis is the polar factor `P` of `A = P H` (`polar.py`), the mixing is `H`: both are unique, so that a distance is a
change and not a sign or an order that a decomposition was free to choose. The R of a QR factorisation, which the paper
compares, is unique only once its diagonal is made positive: without it most of the distance is rows that flipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod, sqrt

import torch
from torch import Tensor

from ortho_cli.errors import TargetError
from ortho_cli.linalg.polar import isometry, polar_factor, right_spectrum, tall_at_unit_scale
from ortho_cli.linalg.spectral import frobenius_norm

__all__ = [
    "Basis", "RDistance", "basis", "factor_stability", "flatten", "mixing_similarity", "noise_floor",
    "principal_angles", "r_distance", "stability", "subspace_overlap", "truncated_stability",
]  # fmt: skip


@dataclass(frozen=True)
class Basis:
    """One decomposition of a weight, from which everything below is read.

    Attributes:
        factor: `P (m, n)`, `m >= n`, of the weight or of its transpose, at least float32.
        values: all singular values `(n,)`, descending, float64.
        vectors: right singular vectors `(n, n)`, in the factor's dtype.
        triangle: `R (n, n)` of `A = Q R` with a diagonal that is not negative, in the factor's dtype.
        rank: directions that are resolved.
    """

    factor: Tensor
    values: Tensor
    vectors: Tensor
    triangle: Tensor
    rank: int

    @property
    def is_resolved(self) -> bool:
        """Whether the weight has full rank, as far as its precision tells."""
        return self.rank == len(self.values)


@dataclass(frozen=True)
class RDistance:
    """`distance` is `||R1 - R2||_F`; `similarity` is `1 - distance / (||R1||_F + ||R2||_F)`, in [0, 1]."""

    distance: float
    similarity: float


def flatten(weight: Tensor) -> Tensor:
    """A weight as the paper sees it: the first dimension against all others, `(out, in kh kw)`.

    Raises:
        TargetError: fewer than two dimensions.

    >>> flatten(torch.zeros(8, 3, 3, 3)).shape
    torch.Size([8, 27])
    """
    if weight.ndim < 2:
        raise TargetError(f"a basis has at least two dimensions, found shape {tuple(weight.shape)}")
    return weight.reshape(weight.shape[0], prod(weight.shape[1:]))


def basis(weight: Tensor, *, stored: torch.dtype | None = None) -> Basis:
    """Decompose a weight of any shape, once for all measures.

    Args:
        weight: two or more dimensions, any plain float type.
        stored: the type whose rounding the values have, where that is coarser than the weight's own: singular values
            that are no larger than its rounding are not resolved.

    Raises:
        TargetError: fewer than two dimensions, or an empty weight.
        NumericsError: a value that is not finite.

    Cost: `4 m n k + 12 k^3` flops, `k = min(m, n)`; memory for the weight and a few `k x k` matrices.

    >>> basis(torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]])).values.tolist()
    [3.0, 2.0]
    """
    tall, scale, rounding = tall_at_unit_scale(flatten(weight), stored)
    spectrum = right_spectrum(tall, rounding)
    triangle, failed = torch.linalg.cholesky_ex(spectrum.squared, upper=True)
    if bool(failed) or spectrum.rank < len(spectrum.values):
        triangle = torch.linalg.qr(tall.double(), mode="r").R
        triangle = triangle * torch.where(triangle.diagonal() < 0, -1.0, 1.0)[:, None]
    factor, vectors = isometry(tall, spectrum), spectrum.vectors.to(tall.dtype)
    return Basis(factor, spectrum.values.double() * scale, vectors, (triangle * scale).to(tall.dtype), spectrum.rank)


def stability(previous: Tensor, current: Tensor) -> float:
    r"""Say how far the basis of a weight has settled: the mean cosine between its directions then and now.

    Args:
        previous: a weight of two or more dimensions, any plain float type.
        current: the same weight later; of the same shape once flattened.

    Returns:
        :math:`\operatorname{tr}(P_1^T P_2) / n` in [-1, 1]: 1 for the same basis, 0 for two that are independent. Where
        a weight does not have full rank, the mean over the directions that both resolve.

    Raises:
        TargetError: shapes that differ, or fewer than two dimensions.
        NumericsError: a value that is not finite.

    Cost: two polar factors, `4 m n k + 11 k^3` flops each with `k = min(m, n)`.
    Reference: OIALR, arXiv:2401.08505, section 3.

    >>> weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    >>> round(stability(weight, 3 * weight), 6), round(stability(weight, -weight), 6)
    (1.0, -1.0)
    """
    return factor_stability(*(polar_factor(flatten(weight)).factor for weight in (previous, current)))


def factor_stability(previous: Tensor, current: Tensor) -> float:
    """The stability of two polar factors of one shape; 0 where one has no directions at all.

    Raises:
        TargetError: shapes that differ.

    Cost: `2 m n` flops.

    >>> round(factor_stability(torch.eye(3), torch.eye(3)[:, [0, 2, 1]]), 6)
    0.333333
    """
    if previous.shape != current.shape:
        raise TargetError(
            f"bases of shapes {tuple(previous.shape)} and {tuple(current.shape)} cannot be compared",
            hint="a weight that was factored is compared by its product",
        )
    squares = [float(frobenius_norm(factor).square()) for factor in (previous, current)]
    directions = [round(square) for square in squares]
    if not all(directions):
        return 0.0
    inner = float(torch.linalg.vecdot(previous, current.to(previous)).sum(dtype=torch.float64))
    return inner / sqrt(prod(squares)) * sqrt(max(directions) / min(directions))  # a cosine, and 1 where one is cut


def truncated_stability(previous: Basis, current: Basis, rank: int) -> float:
    """The stability of the leading directions alone: of the polar factors of the best rank-r approximations.

    Args:
        previous: of a layer.
        current: of the same layer later.
        rank: how many directions; at most those that both resolve count.

    Cost: `4 m n r` flops.

    >>> a = basis(torch.diag(torch.tensor([4.0, 2.0, 0.1])))
    >>> b = basis(torch.diag(torch.tensor([4.0, 2.0, -0.1])))
    >>> round(truncated_stability(a, b, 2), 6), round(factor_stability(a.factor, b.factor), 6)
    (1.0, 0.333333)
    """
    rank = min(rank, previous.rank, current.rank)
    if not rank:
        return 0.0
    right = current.vectors[:, :rank].mT @ previous.vectors[:, :rank]
    left = _leading(previous, rank).mT @ _leading(current, rank)
    return float((right.mT * left).sum(dtype=torch.float64)) / rank


def principal_angles(previous: Basis, current: Basis, rank: int) -> tuple[Tensor, Tensor]:
    """Angles between the leading subspaces, on the long side and on the short side of the weight.

    Args:
        previous: of a layer.
        current: of the same layer later.
        rank: dimension of the subspaces; at most the directions that both resolve.

    Returns:
        Radians, ascending, float64, `(r,)` each: of the `m`-dimensional side, then of the `n`-dimensional one.

    Cost: `4 m n r + 20 r^3` flops.

    >>> a, b = basis(torch.diag(torch.tensor([2.0, 1.0]))), basis(torch.diag(torch.tensor([1.0, 2.0])))
    >>> [round(float(angle), 4) for side in principal_angles(a, b, 1) for angle in side]
    [1.5708, 1.5708]
    """
    rank = min(rank, previous.rank, current.rank)
    left = _angles(_leading(previous, rank), _leading(current, rank))
    return left, _angles(previous.vectors[:, :rank], current.vectors[:, :rank])


def subspace_overlap(previous: Basis, current: Basis, rank: int) -> float:
    """The mean squared cosine of the principal angles on the long side, in [0, 1]; blind to signs and mixing.

    >>> round(subspace_overlap(basis(torch.eye(3)[:, :2]), basis(-torch.eye(3)[:, :2]), 2), 6)
    1.0
    """
    rank = min(rank, previous.rank, current.rank)
    if not rank:
        return 0.0
    product = _leading(previous, rank).mT @ _leading(current, rank)
    return float(frobenius_norm(product).square()) / rank


def mixing_similarity(previous: Basis, current: Basis) -> float:
    r"""The cosine of the polar factors `H = V S V^T`: 1 where only the scale has changed; 0 where one is zero.

    :math:`\langle H_1, H_2\rangle = \sum_{ij} s_i (v_i^T w_j)^2 t_j`, so that neither is formed.

    Cost: `2 n^3` flops.

    >>> weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    >>> round(mixing_similarity(basis(weight), basis(-2 * weight)), 6)
    1.0
    """
    norms = float(previous.values.norm() * current.values.norm())
    squares = (previous.vectors.mT @ current.vectors).square()
    inner = previous.values @ squares.double() @ current.values
    return float(inner) / norms if norms else 0.0


def r_distance(previous: Basis, current: Basis) -> RDistance:
    """How far apart the R of two QR factorisations are, both with a diagonal that is not negative.

    Cost: `3 n^2` flops.

    >>> r_distance(basis(torch.eye(2)), basis(-torch.eye(2)))
    RDistance(distance=0.0, similarity=1.0)
    """
    distance = float(frobenius_norm(previous.triangle - current.triangle))
    both = float(frobenius_norm(previous.triangle) + frobenius_norm(current.triangle))
    return RDistance(distance, 1 - distance / both if both else 1.0)


def noise_floor(rows: int, cols: int) -> float:
    """The standard deviation of the stability of two independent random weights: nothing below it is a sign of a basis.

    >>> noise_floor(768, 768)
    0.0013020833333333333
    """
    return 1 / sqrt(rows * cols)


def _leading(of: Basis, rank: int) -> Tensor:
    """Left singular vectors `(m, r)`."""
    return of.factor @ of.vectors[:, :rank]


def _angles(first: Tensor, second: Tensor) -> Tensor:
    """Principal angles, small ones by their sines (an arc cosine loses half the digits there).

    Reference: Bjorck and Golub 1973.
    """
    first, second = first.double(), second.double()
    product = first.mT @ second
    cosines = torch.linalg.svdvals(product).clamp(max=1.0)
    sines = torch.linalg.svdvals(second - first @ product).clamp(max=1.0).flip(-1)
    angles: Tensor = torch.where(cosines.square() > 0.5, sines.asin(), cosines.acos())
    return angles
