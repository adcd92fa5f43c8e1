r"""Several rotations in one span: products and means at the cost of `m x m`, `m` the directions all of them move.

With `Z` an orthonormal basis of the joint span, `D_i = I + Z (K_i - I) Z^T` exactly, every `K_i (m, m)` orthogonal. So
whatever is done to the `D_i` is done to the `K_i`: a mean of `d x d` rotations needs no `d x d` logarithm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import pi
from typing import NamedTuple

import torch
from torch import Tensor

from ortho_cli.errors import NumericsError, TargetError
from ortho_cli.linalg.planes import HALF_TURN, find_planes, rotation_logs
from ortho_cli.linalg.rotation import LowRankRotation

__all__ = [
    "JointSpan",
    "compose",
    "grassmann_mean",
    "join",
    "karcher_mean",
    "log_mean",
    "order_effect",
    "orthomerge",
    "restore_angles",
    "slerp",
]

# Directions of several orthonormal bases that differ by less than this are one: equal adapters share a span.
SAME_DIRECTION = 1e-12
CONVERGED, LIMIT = 1e-12, 200
# A mean is unique while every part lies nearer than a quarter turn; beyond, another may lie nearer.
QUARTER_TURN = pi / 2 - HALF_TURN
# Eigenvalues of a mean projector nearer than this do not say which directions it keeps.
TIE = 1e-9
# A Gram-Schmidt adapter is symmetric to rounding.
SYMMETRIC = 1e-6


class JointSpan(NamedTuple):
    """`basis`: `Z (d, m)`, orthonormal; `cores`: `K_i (n, m, m)`, orthogonal; both float64."""

    basis: Tensor
    cores: Tensor


def join(rotations: Sequence[LowRankRotation]) -> JointSpan:
    """Write several rotations of one side in a basis of everything that any of them moves.

    Args:
        rotations: at least one, all of one width and side.

    Raises:
        TargetError: different widths or sides.

    Cost: `O(d m^2)` with `m` at most the sum of their ranks.

    >>> turn = LowRankRotation(torch.eye(3)[:, :2], torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
    >>> join([turn, turn]).cores.shape
    torch.Size([2, 2, 2])
    """
    shapes = {(rotation.side, rotation.basis.shape[0]) for rotation in rotations}
    if len(shapes) != 1:
        found = " and ".join(f"{width} ({side} side)" for side, width in sorted(shapes))
        raise TargetError(f"rotations of different widths or sides: {found}", hint="were they trained on one model?")
    left, singular, _ = torch.linalg.svd(
        torch.cat([rotation.basis for rotation in rotations], dim=1), full_matrices=False
    )
    basis = left[:, singular > SAME_DIRECTION]
    cores = []
    for rotation in rotations:
        seen = basis.T @ rotation.basis
        eye = torch.eye(rotation.rank, dtype=torch.float64)
        cores.append(torch.eye(basis.shape[1], dtype=torch.float64) + seen @ (rotation.core - eye) @ seen.T)
    return JointSpan(basis, torch.stack(cores))


def compose(cores: Tensor, strengths: Sequence[float]) -> Tensor:
    """The product `K_1^s_1 K_2^s_2 ...`: on the input side the first acts on the weight first.

    Args:
        cores: `(n, m, m)`.
        strengths: one each; other than 0 and 1 they need determinant +1.

    >>> compose(torch.eye(2).expand(2, 2, 2), [1.0, 1.0]).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    product: Tensor = torch.eye(cores.shape[-1], dtype=torch.float64)
    for core, strength in zip(cores, strengths, strict=True):
        if strength:
            product = product @ (core.double() if strength == 1 else find_planes(core).power(strength))
    return product


def log_mean(cores: Tensor, shares: Sequence[float]) -> Tensor:
    """The exponential of the mean logarithm: the mean of rotations that commute, near it for small angles.

    Args:
        cores: `(n, m, m)`, of determinant +1 and without half turns.
        shares: how much each counts; their sum is 1 for a mean.

    Raises:
        TargetError: determinant -1.
        NumericsError: a half turn, whose logarithm is not one.
    """
    logs = rotation_logs(cores)
    mean: Tensor = torch.linalg.matrix_exp(torch.einsum("n,nij->ij", _numbers(shares), logs))
    return mean


def karcher_mean(cores: Tensor, shares: Sequence[float]) -> Tensor:
    """The rotation whose squared angles to all the others, weighted, are least (the Riemannian centre of mass).

    For two it is the point on the shortest path between them; for more, `X <- X exp(sum_i w_i log(X^T K_i))` is
    iterated from the log-mean until the step vanishes.

    Args:
        cores: `(n, m, m)`, all of one determinant.
        shares: at least 0, of sum 1.

    Raises:
        TargetError: some mirror a direction (determinant -1) and some do not.
        NumericsError: the parts lie too far apart for one mean: two half a turn, of more one a quarter turn from it.

    Cost: a handful of iterations of `n` symmetric eigenproblems of size m.
    Reference: Moakher, "Means and averaging in the group of rotations", 2002.
    """
    counted = [index for index, share in enumerate(shares) if share]
    cores, weights = cores[counted], _numbers([shares[index] for index in counted])
    if len(counted) <= 2:
        return slerp(cores[0], cores[-1], float(weights[-1]) if len(counted) == 2 else 0.0)
    starts: list[Callable[[], Tensor]] = [
        lambda: log_mean(cores, weights.tolist()),
        # Where the parts turn by nearly pi, their logarithms point apart though they are near each other.
        lambda: cores[0] @ log_mean(cores[0].T @ cores, weights.tolist()),
    ]
    mirrored = bool((torch.linalg.det(cores) < 0).all())
    reason = ""
    for start in starts[mirrored:]:
        try:
            mean, logs = _iterate(start(), cores.double(), weights)
        except NumericsError as error:
            reason = error.message
            continue
        farthest = float(torch.linalg.matrix_norm(logs, ord=2).max())
        if farthest < QUARTER_TURN:
            return mean
        reason = f"they lie up to {farthest / pi:.2f} pi from the nearest candidate"
    raise NumericsError(
        f"these rotations have no one mean: {reason}",
        hint="apply them one after the other (--mode compose), or weigh one of two more (--mode slerp)",
    )


def _iterate(mean: Tensor, cores: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    for _ in range(LIMIT):
        logs = rotation_logs(mean.T @ cores)
        step = torch.einsum("n,nij->ij", weights, logs)
        mean = mean @ torch.linalg.matrix_exp(step)
        if float(torch.linalg.matrix_norm(step)) < CONVERGED:
            return mean, logs
    raise NumericsError(f"the mean did not settle in {LIMIT} iterations")


def orthomerge(cores: Tensor, shares: Sequence[float]) -> Tensor:
    """Average directions and magnitudes apart, so that adapters which agree in part do not shrink each other.

    In Cayley coordinates `A_i = (K_i + I)^-1 (K_i - I)`: the direction is that of the weighted sum, the magnitude the
    weighted mean of the norms.

    Args:
        cores: `(n, m, m)`, of determinant +1.
        shares: at least 0, of sum 1.

    Raises:
        NumericsError: an eigenvalue -1, where Cayley coordinates are infinite.

    Reference: OrthoMerge, arXiv:2602.05943.
    """
    eye = torch.eye(cores.shape[-1], dtype=torch.float64)
    for core in cores:
        planes = find_planes(core)
        if planes.half_turns or bool((planes.factors < 0).any()):
            raise NumericsError(
                "OrthoMerge's coordinates are infinite at a half turn or a mirrored direction, which one of these has",
                hint="for adapters that reflect a subspace (apply_GS): --mode grassmann; else --mode compose",
            )
    skew = torch.linalg.solve(cores.double() + eye, cores.double() - eye)
    weights = _numbers(shares)
    total = torch.einsum("n,nij->ij", weights, skew)
    length = torch.linalg.matrix_norm(total)
    magnitude = (weights * torch.linalg.matrix_norm(skew)).sum()
    merged = total * (magnitude / length) if float(length) > CONVERGED * float(magnitude) else torch.zeros_like(total)
    rotation: Tensor = torch.linalg.solve(eye - merged, eye + merged)
    return rotation


def slerp(first: Tensor, second: Tensor, t: float) -> Tensor:
    """The point at `t` of the shortest path from one rotation (0) to the other (1): `K_1 (K_1^T K_2)^t`.

    Raises:
        NumericsError: they are half a turn apart, and there are two shortest paths.
        TargetError: one mirrors and the other does not.

    Reference: OrthoFuse, arXiv:2604.05183.

    >>> slerp(torch.eye(2), torch.tensor([[0.0, -1.0], [1.0, 0.0]]), 1.0).round(decimals=9).tolist()
    [[0.0, -1.0], [1.0, 0.0]]
    """
    path: Tensor = torch.linalg.matrix_exp(t * rotation_logs((first.double().T @ second.double())[None])[0])
    return first.double() @ path


def restore_angles(merged: Tensor, cores: Tensor, shares: Sequence[float]) -> Tensor:
    """Turn a merged rotation on, until its angles have the norm that the parts' have on average.

    Raises:
        TargetError: determinant -1.
        NumericsError: a plane would turn past half a turn, the other way round.

    Reference: the spectra restoration of OrthoFuse, arXiv:2604.05183.
    """
    planes = find_planes(merged)
    norm = float(torch.linalg.vector_norm(planes.angles))
    parts = torch.stack([torch.linalg.vector_norm(find_planes(core).angles) for core in cores])
    factor = float((_numbers(shares) * parts).sum()) / norm if norm > CONVERGED else 1.0
    if norm > CONVERGED and float(planes.angles.max()) * factor > pi:
        raise NumericsError(
            f"restored, a plane would turn by {float(planes.angles.max()) * factor / pi:.2f} pi, past half a turn",
            hint="leave --restore-angles out",
        )
    return planes.power(factor)


def grassmann_mean(cores: Tensor, shares: Sequence[float]) -> Tensor:
    """The mean of Gram-Schmidt adapters `I - 2 P`: the `r` directions that their projectors share most.

    Args:
        cores: `(n, m, m)`, symmetric, each reflecting the same number `r` of directions.
        shares: at least 0.

    Raises:
        TargetError: one of them is no reflection of a subspace, or they reflect different numbers of directions.
        NumericsError: the projectors do not say which `r` directions to keep.

    Reference: the extrinsic mean on the Grassmann manifold; Sarlette and Sepulchre 2009.

    >>> mirror = torch.diag(torch.tensor([-1.0, 1.0]))
    >>> grassmann_mean(torch.stack([mirror, mirror]), [0.5, 0.5]).tolist()
    [[-1.0, 0.0], [0.0, 1.0]]
    """
    wide = cores.double()
    if float((wide - wide.mT).abs().amax()) > SYMMETRIC:
        raise TargetError(
            "the Grassmann mean is one of adapters that reflect a subspace (apply_GS); one of these turns, as a "
            "Gram-Schmidt adapter that starts at the identity does",
            hint="--mode mean averages rotations",
        )
    eye = torch.eye(wide.shape[-1], dtype=torch.float64)
    projectors = (eye - wide) / 2
    ranks = {round(float(projector.trace())) for projector in projectors}
    if len(ranks) != 1:
        raise TargetError(f"the adapters reflect {' and '.join(map(str, sorted(ranks)))} directions: no mean subspace")
    (rank,) = ranks
    if not rank:
        return eye
    values, vectors = torch.linalg.eigh(torch.einsum("n,nij->ij", _numbers(shares), projectors))
    if rank < len(values) and float(values[-rank] - values[-rank - 1]) < TIE:
        raise NumericsError(
            f"the adapters share no {rank} directions more than others: their mean subspace is not one",
            hint="weigh one of them more, e.g. ADAPTER=2",
        )
    kept = vectors[:, len(values) - rank :]
    mean: Tensor = eye - 2 * kept @ kept.T
    return mean


def order_effect(cores: Tensor) -> float:
    """How much the order of composition matters: the largest `||K_i K_j - K_j K_i||_F` of any two.

    >>> order_effect(torch.eye(2).expand(2, 2, 2))
    0.0
    """
    wide = cores.double()
    products = torch.einsum("aij,bjk->abik", wide, wide)
    return float(torch.linalg.matrix_norm(products - products.transpose(0, 1)).max())


def _numbers(shares: Sequence[float]) -> Tensor:
    return torch.tensor(shares, dtype=torch.float64)
