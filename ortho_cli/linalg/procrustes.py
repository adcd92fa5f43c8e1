r"""The rotation of few directions that best takes one weight to another: `argmin_D ||W_0 D - W_1||_F`.

Over all rotations this is Procrustes' problem, `in x in` and ill-posed where `W_0` is nearly singular. The change
`W_1 - W_0` of a low-rank rotation has its row space in the span that turns; restricted to that span the problem is
`k x k`, and exact for `W_1 = W_0 D`.
"""

from __future__ import annotations

from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from ortho_cli.errors import NumericsError, TargetError
from ortho_cli.linalg.planes import find_planes
from ortho_cli.linalg.precision import at_least_float32
from ortho_cli.linalg.rotation import LowRankRotation, orthonormal_basis
from ortho_cli.linalg.spectral import RESOLVED, frobenius_norm, spectral_factors
from ortho_cli.linalg.subspace_iteration import TOLERANCE, leading_subspace, prefers_subspace

__all__ = ["extract_rotation", "nearest_rotation"]

# The span searched beside what is kept: the directions that change most need not be those that turn most.
SEARCHED = 2
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


def extract_rotation(weight: Tensor, change: Tensor, reflections: int) -> LowRankRotation:
    """Find the rotation on the input side that explains the most of a weight's change.

    The leading right singular vectors of the change span twice what is asked for; Procrustes' problem is solved there,
    the planes that move the weight most are kept, and it is solved once more within them. Where float32 products could
    not see the last of the directions beside the first, those of what is left of the change are searched as well; where
    there are fewer outputs than reflections, those of the weight.

    Args:
        weight: `W_0 (out, in)`, any plain float type.
        change: `W_1 - W_0 (out, in)`, likewise.
        reflections: how many the adapter may have, at least 2: one alone mirrors, and does not turn. Of an odd number
            the last is not used.

    Returns:
        A rotation of at most that many directions; of none where nothing changed.

    Raises:
        TargetError: shapes that differ, or fewer than two reflections.
        NumericsError: a value that is not finite.

    Cost: the leading subspace of an `out x in` matrix, at worst two (each a dozen products with `2 r` columns).
    Reference: OrthoMerge, arXiv:2602.05943, section 3 (for all of `in x in`).

    >>> turn = LowRankRotation(torch.eye(3)[:, :2], torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
    >>> weight = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, -1.0]])
    >>> found = extract_rotation(weight, turn.apply(weight) - weight, 2)
    >>> bool(torch.allclose(found.apply(weight), turn.apply(weight), atol=1e-6))
    True
    """
    if weight.shape != change.shape or weight.dim() != 2:
        raise TargetError(f"a weight of shape {tuple(weight.shape)}, a change of {tuple(change.shape)}: not one layer")
    if reflections < 2:
        raise TargetError(f"a rotation takes at least two reflections, found {reflections}")
    start, moved = at_least_float32(weight, "weight"), at_least_float32(change, "change")
    norm = float(frobenius_norm(moved))
    if not isfinite(norm):
        raise NumericsError(f"the change of a weight of shape {tuple(start.shape)} is not finite")
    if norm == 0:
        nothing = start.new_zeros(start.shape[1], 0, dtype=torch.float64)
        return LowRankRotation(nothing, nothing[:0], dtype=start.dtype)
    span, resolved = _leading_rows(moved, SEARCHED * reflections, reflections)
    if span.shape[1] < reflections:
        span = _filled_up(span, start, reflections)
    seen = _Seen.of(start, moved, span)
    if not resolved:
        left = torch.addmm(moved, seen.before @ seen.turn().to(start.dtype), span.T.to(start.dtype), alpha=-1)
        more, _ = _leading_rows(left, reflections, reflections)
        span = orthonormal_basis(torch.cat([span, more], dim=1))[0]
        seen = _Seen.of(start, moved, span)
    kept = seen.planes_that_move(reflections // 2)
    core = nearest_rotation(seen.before.double() @ kept, seen.after.double() @ kept)
    return LowRankRotation(span @ kept, core, dtype=start.dtype)


class _Seen(NamedTuple):
    """Both weights within a span: `W_0 Z` and `W_1 Z`, and the rotation `K` between them."""

    before: Tensor
    after: Tensor
    core: Tensor

    @classmethod
    def of(cls, start: Tensor, moved: Tensor, span: Tensor) -> _Seen:
        columns = span.to(start.dtype)
        before = start @ columns
        after = torch.addmm(before, moved, columns)
        return cls(before, after, nearest_rotation(before, after))

    def turn(self) -> Tensor:
        """`K - I`."""
        return self.core - torch.eye(self.core.shape[0], dtype=self.core.dtype)

    def planes_that_move(self, count: int) -> Tensor:
        """Orthonormal `(k, 2 count)`: the planes whose turn moves the weight most, by `2 sin(t / 2) ||W_0 Z P||_F`."""
        planes = find_planes(self.core)
        columns = planes.pairs.transpose(0, 1)
        moved = (self.before.double() @ columns.flatten(1)).square().sum(0).view(-1, 2).sum(1).sqrt()
        order = ((planes.angles / 2).sin() * moved).argsort(descending=True, stable=True)
        basis: Tensor = torch.linalg.qr(columns[:, order[:count]].flatten(1)).Q
        return basis


def _filled_up(span: Tensor, weight: Tensor, reflections: int) -> Tensor:
    """The span of a change, and directions of the weight: what one row turns in is a plane, what it changes by a line.

    Any directions would do for a rotation with this change; the weight's own give the one of the smallest angles.
    """
    rows = weight.double()
    rows = (rows - (rows @ span) @ span.T) / (torch.linalg.vector_norm(rows) or 1)
    return torch.cat([span, orthonormal_basis(rows.T)[0][:, : reflections - span.shape[1]]], dim=1)


def _leading_rows(matrix: Tensor, rank: int, needed: int) -> tuple[Tensor, bool]:
    """Orthonormal `(in, rank)`, float64: the leading right singular vectors; whether the first `needed` are sure."""
    height, width = matrix.shape
    rank = min(rank, height, width)
    if not prefers_subspace(height, width, rank, TOLERANCE):
        return _orthonormal(spectral_factors(matrix, rank, method="gram").vt.mT), True
    tall = height >= width
    basis, product = leading_subspace(matrix if tall else matrix.mT, rank)
    values = torch.linalg.vector_norm(product, dim=0)
    return _orthonormal(basis if tall else product), bool(values[needed - 1] > RESOLVED * values[0])


def _orthonormal(columns: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(columns.double()).Q
    return basis
