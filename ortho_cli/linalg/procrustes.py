r"""The rotation of few directions that best takes one weight to another: `argmin_D ||W_0 D - W_1||_F`.

Over all rotations this is Procrustes' problem, `in x in` and ill-posed where `W_0` is nearly singular. The change
`W_1 - W_0` of a low-rank rotation has its row space in the span that turns; restricted to that span the problem is
`k x k`, and exact for `W_1 = W_0 D`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ortho_cli.errors import TargetError
from ortho_cli.linalg.precision import at_least_float32
from ortho_cli.linalg.rotation import LowRankRotation
from ortho_cli.linalg.spectral import frobenius_norm, spectral_factors

__all__ = ["explained_share", "extract_rotation", "nearest_rotation"]

# The span searched beside what is kept: the noise of rounded weights may hide a small angle behind it.
SEARCHED = 2


def nearest_rotation(before: Tensor, after: Tensor) -> Tensor:
    r"""The rotation K closest to taking the columns of one matrix to those of another, `argmin ||P K - Q||_F`.

    Args:
        before: `P (n, k)`.
        after: `Q (n, k)`.

    Returns:
        `K (k, k)`, float64, determinant +1.

    Cost: `O(n k^2)`.
    Reference: Schoenemann 1966; Kabsch 1976 for the determinant.

    >>> nearest_rotation(torch.eye(2), torch.tensor([[0.0, -1.0], [1.0, 0.0]])).tolist()
    [[0.0, -1.0], [1.0, 0.0]]
    """
    left, _, right = torch.linalg.svd(before.double().T @ after.double())
    if float(torch.linalg.det(left @ right)) < 0:
        left = torch.cat([left[:, :-1], -left[:, -1:]], dim=1)
    rotation: Tensor = left @ right
    return rotation


def extract_rotation(before: Tensor, after: Tensor, reflections: int | Callable[[Tensor], int]) -> LowRankRotation:
    """Find the rotation on the input side that explains the most of a weight's change.

    The leading right singular vectors of the change span twice what is asked for; Procrustes' problem is solved there,
    the planes of largest angle are kept, and it is solved once more within them.

    Args:
        before: `W_0 (out, in)`, any plain float type.
        after: `W_1 (out, in)`.
        reflections: how many the adapter may have, at least 2; or a rule that reads it from the singular values of the
            change.

    Raises:
        TargetError: shapes that differ, or fewer than two reflections: one alone mirrors, and does not turn.

    Cost: the leading subspace of an `out x in` matrix (a dozen products with `2 r` columns).
    Reference: OrthoMerge, arXiv:2602.05943, section 3 (for all of `in x in`).

    >>> turn = LowRankRotation(torch.eye(3)[:, :2], torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
    >>> weight = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, -1.0]])
    >>> found = extract_rotation(weight, turn.apply(weight), 2)
    >>> bool(torch.allclose(found.apply(weight), turn.apply(weight), atol=1e-6))
    True
    """
    if before.shape != after.shape or before.dim() != 2:
        raise TargetError(f"weights of shapes {tuple(before.shape)} and {tuple(after.shape)}: not one layer")
    start, end = at_least_float32(before, "weight"), at_least_float32(after, "weight")
    sides = min(start.shape)

    def searched(values: Tensor) -> int:
        return min(sides, SEARCHED * (reflections if isinstance(reflections, int) else reflections(values)))

    rank = min(sides, SEARCHED * reflections) if isinstance(reflections, int) else searched
    factors = spectral_factors(end - start, rank)
    kept = reflections if isinstance(reflections, int) else max(2, -(-factors.vt.shape[0] // SEARCHED))
    if kept < 2:
        raise TargetError(f"a rotation takes at least two reflections, found rank {kept}")
    turned = factors.values > 0
    if not bool(turned.any()):
        return LowRankRotation(start.new_zeros(start.shape[1], 0), start.new_zeros(0, 0), dtype=start.dtype)
    basis = torch.linalg.qr(factors.vt[turned].double().T).Q
    first = _restricted(start, end, basis).truncate(kept).rotation
    return _restricted(start, end, torch.linalg.qr(first.basis).Q)


def _restricted(start: Tensor, end: Tensor, basis: Tensor) -> LowRankRotation:
    span = basis.to(start.dtype)
    return LowRankRotation(basis, nearest_rotation(start @ span, end @ span), dtype=start.dtype)


def explained_share(before: Tensor, after: Tensor, found: Tensor) -> float:
    """The share of `||W_1 - W_0||_F^2` that a reconstruction explains: 1 is all of it, below 0 worse than nothing.

    >>> explained_share(torch.zeros(1, 1), torch.ones(1, 1), torch.full((1, 1), 0.5))
    0.75
    """
    change = float(frobenius_norm(after - before))
    missed = float(frobenius_norm(after - found))
    return 1.0 if change == 0 else 1 - (missed / change) ** 2
