r"""A rotation as turns in planes: angles, fractional powers and logarithms of small orthogonal matrices.

A real orthogonal `K` is `Q diag(R(t_1), ..., R(t_p), 1, ...) Q^T`: every plane turns by its own angle. Whatever keeps
the planes and changes the angles is then plain arithmetic. The planes come from the real Schur form, which is backward
stable where eigenvectors are not: at equal angles, near none, and near half a turn.
"""

from __future__ import annotations

from math import pi
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ortho_cli.errors import NumericsError, TargetError

__all__ = ["HALF_TURN", "Planes", "find_planes", "orthogonality_defect", "plane_angles", "rotation_logs"]

# Within this of pi, the plane a rotation turns in is mostly rounding: the logarithm is not unique there.
HALF_TURN = 1e-6
# Above this cosine of every angle t / sin t is smooth enough to be taken of a matrix.
NEAR_HALF = -0.9
# Off-diagonal mass of the Schur form of a normal matrix is rounding; more is a matrix that does not turn in planes.
NORMAL = 1e-6


class Planes(NamedTuple):
    """`K = Q diag(s_i R(t_i)) Q^T`: `pairs` holds the two columns of Q for each plane.

    Attributes:
        pairs: `(p, k, 2)`, orthonormal; a plane turns from its first column towards its second.
        angles: `(p,)` in `(0, pi]`, descending.
        lengths: `(p,)` by which a plane is stretched; 1 for a rotation.
        axes: `(k, q)`, the other columns of Q, each kept or reflected.
        factors: `(q,)`, their eigenvalues, at most one of them negative; 1 and -1 for an orthogonal K.
    """

    pairs: Tensor
    angles: Tensor
    lengths: Tensor
    axes: Tensor
    factors: Tensor

    def matrix(self, angles: Tensor, lengths: Tensor, factors: Tensor) -> Tensor:
        """The map `(k, k)` in the same planes with other angles, lengths and factors."""
        first, second = self.pairs.unbind(-1)
        cosine, sine = (lengths * angles.cos())[:, None], (lengths * angles.sin())[:, None]
        turned = first.T @ (cosine * first - sine * second) + second.T @ (sine * first + cosine * second)
        return turned + (self.axes * factors) @ self.axes.T

    def power(self, alpha: float) -> Tensor:
        """`K^alpha (k, k)`: every angle times `alpha`, every length to the power of it.

        Raises:
            TargetError: an axis is reflected (determinant -1) and `alpha` is not 0 or 1: no real path leads there.
        """
        if alpha == 0:
            return torch.eye(self.axes.shape[0], dtype=self.axes.dtype)
        if alpha != 1:
            self.refuse_reflection()
        return self.matrix(self.angles * alpha, self.lengths**alpha, self.factors**alpha)

    def log(self) -> Tensor:
        """The skew-symmetric `L (k, k)` of smallest norm with `exp(L) = K`, for an orthogonal K.

        Raises:
            TargetError: an axis is reflected.
        """
        self.refuse_reflection()
        first, second = self.pairs.unbind(-1)
        half = second.T @ (self.angles[:, None] * first)
        return half - half.T

    def refuse_reflection(self) -> None:
        """Refuse a map of determinant -1.

        Raises:
            TargetError: with the reason.
        """
        if bool((self.factors < 0).any()):
            raise TargetError(
                "an odd number of reflections mirrors a direction, and no rotation leads halfway to a mirror image",
                hint="strength and means need an even rank; 0 and 1 are always possible",
            )

    @property
    def half_turns(self) -> int:
        """Planes that turn by pi: which plane that is, is a choice wherever there are several."""
        return int((self.angles > pi - HALF_TURN).sum())


def find_planes(core: Tensor) -> Planes:
    r"""Take an orthogonal matrix apart into the planes it turns in.

    Two eigenvalues -1 make one half turn, paired in the order in which the Schur form lists them: the same input gives
    the same pairs. Scaled rotations (any normal matrix without other negative eigenvalues) are understood as well.

    Args:
        core: `K (k, k)`, orthogonal; computed in float64 on the CPU.

    Raises:
        NumericsError: a value that is not finite, or a matrix that is not normal.

    Cost: `O(k^3)`, about 25 k^3 flops.
    Reference: Golub and Van Loan, "Matrix Computations", 4th edition, theorem 7.4.1 and corollary 7.1.4.

    >>> turn = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    >>> found = find_planes(turn)
    >>> [round(angle, 6) for angle in found.angles.tolist()], found.factors.tolist()
    ([1.570796], [1.0])
    >>> found.power(1 / 3)[:2, 0].round(decimals=6).tolist()
    [0.866025, 0.5]
    """
    import numpy as np
    from scipy.linalg import schur

    wide = core.detach().to("cpu", torch.float64)
    size = wide.shape[0]
    if not bool(wide.isfinite().all()):
        raise NumericsError("a rotation holds values that are not finite")
    if not size:
        empty = wide.new_zeros(0)
        return Planes(wide.new_zeros(0, 0, 2), empty, empty, wide, empty)
    upper, basis = schur(wide.numpy(), output="real")
    diagonal = upper.diagonal()
    below = np.append(upper.diagonal(-1), 0.0)
    first = np.flatnonzero(below)  # of the 2 x 2 blocks
    alone = np.setdiff1d(np.arange(size), [first, first + 1])
    _check_normal(upper, first)
    cosine = (diagonal[first] + diagonal[first + 1]) / 2
    sine = (below[first] - upper[first, first + 1]) / 2
    mirrored = alone[diagonal[alone] < 0]
    halves = mirrored[: len(mirrored) // 2 * 2].reshape(-1, 2)
    pairs = np.concatenate([np.where(sine > 0, [first, first + 1], [first + 1, first]).T, halves])
    angles = np.concatenate([np.arctan2(np.abs(sine), cosine), np.full(len(halves), pi)])
    lengths = np.concatenate([np.hypot(sine, cosine), np.sqrt(diagonal[halves].prod(axis=1))])
    order = np.argsort(-angles, kind="stable")
    axes = np.concatenate([alone[diagonal[alone] >= 0], mirrored[halves.size :]])
    return Planes(
        torch.from_numpy(basis.T[pairs[order]].transpose(0, 2, 1)),
        torch.from_numpy(angles[order]),
        torch.from_numpy(lengths[order]),
        torch.from_numpy(basis[:, axes]),
        torch.from_numpy(diagonal[axes]),
    )


def _check_normal(upper: Any, first: Any) -> None:
    """Refuse a Schur form `(k, k)`, with blocks at `first`, that is more than block-diagonal."""
    import numpy as np

    beside = np.triu(upper, 1)
    beside[first, first + 1] = 0
    if (off := float(np.linalg.norm(beside))) > NORMAL * len(upper) ** 0.5:
        raise NumericsError(f"a rotation is not one: its Schur form is off by {off:.1e}")


def rotation_logs(cores: Tensor) -> Tensor:
    r"""The skew-symmetric logarithms of rotations all of whose angles are below pi.

    With the symmetric part `S` of K and the skew one `A`, which commute, :math:`\log K = A\,g(S)`,
    :math:`g(\cos t) = t / \sin t`: one batched symmetric eigenproblem. Near half a turn, where g has a pole, the planes
    of K are looked at.

    Args:
        cores: `K (n, k, k)`, orthogonal of determinant +1; computed in float64.

    Returns:
        `(n, k, k)`, float64.

    Raises:
        TargetError: determinant -1.
        NumericsError: a half turn: either way round is as short, and the logarithm not one but many.

    Cost: `O(n k^3)`, about 10 k^3 flops each.

    >>> rotation_logs(torch.tensor([[[0.0, -1.0], [1.0, 0.0]]]))[0].round(decimals=6).tolist()
    [[0.0, -1.570796], [1.570796, 0.0]]
    """
    wide = cores.to(torch.float64)
    cosines, vectors = torch.linalg.eigh((wide + wide.mT) / 2)
    angles = cosines.clamp(-1, 1).acos()
    spread = vectors / torch.sinc(angles / pi)[..., None, :]  # sinc(t / pi) = sin t / t
    product = (wide - wide.mT) @ (spread @ vectors.mT) / 2
    logs: Tensor = (product - product.mT) / 2
    for index in (cosines[..., 0] < NEAR_HALF).nonzero().flatten().tolist():
        logs[index] = _log(wide[index])
    return logs


def _log(core: Tensor) -> Tensor:
    planes = find_planes(core)
    planes.refuse_reflection()
    if planes.half_turns:
        raise NumericsError(
            "two rotations are half a turn apart: both ways round are as short, and none is the mean",
            hint="weigh one of them more with --mode slerp, or take --mode compose",
        )
    return planes.log()


def orthogonality_defect(blocks: Tensor) -> float:
    """Measure how far square blocks are from orthogonal: the largest entry of `|R^T R - I|`, in float64.

    >>> orthogonality_defect(torch.eye(3)[None] * 2)
    3.0
    """
    wide = blocks.to(torch.float64)
    eye = torch.eye(wide.shape[-1], dtype=torch.float64, device=wide.device)
    return float((wide.mT @ wide - eye).abs().max())


def plane_angles(blocks: Tensor) -> Tensor:
    """List the rotation angles of orthogonal blocks, one per plane, largest first.

    The spectrum of an orthogonal matrix is pairs of unit complex numbers at +-angle, plus lone +1 and -1. Pairs give
    one angle each; two -1 make one half turn, a lone -1 (determinant -1) a bare reflection: pi. A +1 that is left over
    turns nothing and is not listed.

    Args:
        blocks: `(n, k, k)`, orthogonal; computed in float64.

    Returns:
        Angles in `[0, pi]`, descending, all blocks together.

    >>> plane_angles(torch.tensor([[[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]]])).tolist()
    [3.141592653589793, 1.5707963267948966]
    """
    wide = blocks.to(torch.float64)
    size = wide.shape[-1]
    if size == 0:
        return wide.new_zeros(0)
    angles: Tensor = torch.linalg.eigvals(wide).angle().abs().sort(dim=-1, descending=True).values
    # Equal angles are neighbours now: every second one counts each pair once, and pi with an odd number of -1 too.
    planes = angles[:, 0::2]
    if size % 2:
        reflected = torch.linalg.slogdet(wide).sign < 0
        lone = torch.zeros_like(planes, dtype=torch.bool)
        lone[:, -1] = ~reflected  # odd size, determinant +1: the smallest belongs to the axis, not to a plane
        planes = planes[~lone]
    return planes.flatten().sort(descending=True).values
