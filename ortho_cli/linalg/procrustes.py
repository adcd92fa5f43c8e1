r"""The rotation of few directions that best takes one weight to another: `argmin_D ||W_0 D - W_1||_F`.

Over all rotations this is Procrustes' problem, `in x in` and ill-posed where `W_0` is nearly singular. The change
`W_1 - W_0` of a low-rank rotation has its row space in the span that turns; restricted to that span the problem is
`k x k`, and exact for `W_1 = W_0 D`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ortho_cli.errors import NumericsError, TargetError
from ortho_cli.linalg.precision import at_least_float32
from ortho_cli.linalg.rotation import LowRankRotation, orthonormal_basis
from ortho_cli.linalg.spectral import frobenius_norm, spectral_factors
from ortho_cli.linalg.subspace_iteration import TOLERANCE, leading_subspace, prefers_subspace

__all__ = ["extract_rotation", "nearest_rotation"]

# Looks at what is left of the change. The second finds what float32 products cannot see beside the largest directions
# of the first: a few thousandths of them, and less.
LOOKS = 2
# Singular values of the fit below this share of the largest are rounding, and so is what they would turn.
INDIFFERENT = 1e-12


def nearest_rotation(before: Tensor, after: Tensor) -> Tensor:
    r"""The rotation K closest to taking the columns of one matrix to those of another, `argmin ||P K - Q||_F`.

    Directions that P does not have (columns of zeros, dependent ones) fit any turn as well; they are not turned.

    Args:
        before: `P (n, k)`.
        after: `Q (n, k)`.

    Returns:
        `K (k, k)`, float64, determinant +1.

    Cost: `O(n k^2)`.
    Reference: Schoenemann 1966; Kabsch 1976 for the determinant.

    >>> nearest_rotation(torch.eye(2), torch.tensor([[0.0, -1.0], [1.0, 0.0]])).tolist()
    [[0.0, -1.0], [1.0, 0.0]]
    >>> nearest_rotation(torch.zeros(3, 2), torch.zeros(3, 2)).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    left, values, right = torch.linalg.svd(before.double().T @ after.double())
    indifferent = values <= INDIFFERENT * values[:1]
    if bool(indifferent.any()):
        outer, _, inner = torch.linalg.svd(left[:, indifferent].T @ right[indifferent].T)
        left = torch.cat([left[:, ~indifferent], left[:, indifferent] @ outer @ inner], dim=1)
    if float(torch.linalg.det(left @ right)) < 0:
        left = torch.cat([left[:, :-1], -left[:, -1:]], dim=1)
    rotation: Tensor = left @ right
    return rotation


def extract_rotation(before: Tensor, after: Tensor, reflections: int) -> LowRankRotation:
    """Find the rotation on the input side that explains the most of a weight's change.

    The leading right singular vectors of the change are the span that turns; Procrustes' problem is solved there, and
    again together with those of what is left. The planes that move the weight most are kept, and it is solved once more
    within them.

    Args:
        before: `W_0 (out, in)`, any plain float type.
        after: `W_1 (out, in)`.
        reflections: how many the adapter may have, at least 2: one alone mirrors, and does not turn. Of an odd number
            the last is not used.

    Returns:
        A rotation of at most that many directions; of none where nothing changed.

    Raises:
        TargetError: shapes that differ, or fewer than two reflections.
        NumericsError: a value that is not finite.

    Cost: two leading subspaces of an `out x in` matrix (each a dozen products with `r` columns).
    Reference: OrthoMerge, arXiv:2602.05943, section 3 (for all of `in x in`).

    >>> turn = LowRankRotation(torch.eye(3)[:, :2], torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
    >>> weight = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, -1.0]])
    >>> found = extract_rotation(weight, turn.apply(weight), 2)
    >>> bool(torch.allclose(found.apply(weight), turn.apply(weight), atol=1e-6))
    True
    """
    if before.shape != after.shape or before.dim() != 2:
        raise TargetError(f"weights of shapes {tuple(before.shape)} and {tuple(after.shape)}: not one layer")
    if reflections < 2:
        raise TargetError(f"a rotation takes at least two reflections, found {reflections}")
    start, end = at_least_float32(before, "weight"), at_least_float32(after, "weight")
    span = start.new_zeros(start.shape[1], 0, dtype=torch.float64)
    found = LowRankRotation(span, span[:0], dtype=start.dtype)
    for _ in range(LOOKS):
        left = found.apply(start)
        norm = float(frobenius_norm(torch.sub(end, left, out=left)))
        if norm != norm or norm == float("inf"):
            raise NumericsError(f"weights of shape {tuple(start.shape)} hold values that are not finite")
        if norm == 0:
            break
        more = _leading_rows(left, min(reflections, min(start.shape) - span.shape[1]))
        span = orthonormal_basis(torch.cat([span, more], dim=1))[0]
        found = _restricted(start, end, span)
    return _restricted(start, end, _planes_that_move(start, found, reflections // 2))


def _leading_rows(matrix: Tensor, rank: int) -> Tensor:
    """Orthonormal `(in, rank)`, float64: the span of the leading right singular vectors."""
    if rank == 0:
        return matrix.new_zeros(matrix.shape[1], 0, dtype=torch.float64)
    height, width = matrix.shape
    if prefers_subspace(height, width, rank, TOLERANCE):
        tall = height >= width
        basis, product = leading_subspace(matrix if tall else matrix.mT, rank)
        rows = basis if tall else product
    else:
        rows = spectral_factors(matrix, rank, method="gram").vt.mT
    span: Tensor = torch.linalg.qr(rows.double()).Q
    return span


def _restricted(start: Tensor, end: Tensor, basis: Tensor) -> LowRankRotation:
    """The best rotation within a span."""
    span = basis.to(start.dtype)
    return LowRankRotation(basis, nearest_rotation(start @ span, end @ span), dtype=start.dtype)


def _planes_that_move(start: Tensor, found: LowRankRotation, count: int) -> Tensor:
    """Orthonormal `(in, 2 count)`: the planes whose turn changes the weight most, by `2 sin(t / 2) ||W_0 P||_F`."""
    planes = found.planes()
    columns = torch.einsum("dk,pkc->dpc", found.basis, planes.pairs)
    seen = (start @ columns.flatten(1).to(start.dtype)).view(start.shape[0], *columns.shape[1:])
    moved = (planes.angles / 2).sin() * seen.double().square().sum((0, 2)).sqrt()
    kept = moved.argsort(descending=True, stable=True)[:count]
    span: Tensor = torch.linalg.qr(columns[:, kept].flatten(1)).Q
    return span
