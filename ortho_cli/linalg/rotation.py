r"""Rotations that move a few directions only: `D = I + Z (K - I) Z^T`, `Z (d, k)` orthonormal, `K (k, k)` orthogonal.

A chain of reflections is one: `V = Z R`, `K = I - R T R^T`. Whatever is a function of D acts on K alone: the inverse is
`K^T`, a power turns every plane of K by a share of its angle, and the product of two lies in the span of both
(`joint_rotation.py`). So all of it costs `r x r`; the `d x d` matrix is never formed.
"""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from ortho_cli.errors import TargetError
from ortho_cli.linalg.operator import Shape, check_block
from ortho_cli.linalg.planes import Planes, find_planes, plane_angles
from ortho_cli.linalg.precision import require_working_dtype

__all__ = ["LowRankRotation", "Truncated", "chain_rotation", "orthonormal_basis"]

# Directions shorter than this beside unit ones are rounding: they are not part of the span.
NULL_DIRECTION = 1e-10
# An angle that float64 arithmetic of a few hundred dimensions makes of nothing.
NO_TURN = 1e-13


def orthonormal_basis(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Find `Z` and `R` with `V = Z R`, dropping what rounding alone added to the span.

    Args:
        columns: `V (d, r)`, of about unit length.

    Returns:
        `Z (d, k)` with orthonormal columns and `R (k, r)`, float64, `k` the rank of V.

    Cost: `O(d r^2)`.

    >>> basis, right = orthonormal_basis(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    >>> tuple(basis.shape), tuple(right.shape)
    ((2, 1), (1, 2))
    """
    left, singular, right = torch.linalg.svd(columns.to(torch.float64), full_matrices=False)
    kept = singular > NULL_DIRECTION
    return left[:, kept], singular[kept, None] * right[kept]


class Truncated(NamedTuple):
    """A rotation of fewer planes, and the `error` `||D - D_R||_F` of leaving the others out."""

    rotation: LowRankRotation
    error: float


class LowRankRotation:
    r"""Rotate one side of a weight within the span of a few directions; `W'` has the singular values of `W`.

    Input side :math:`W' = W D`, output side :math:`W' = D^\top W`, :math:`D = I + Z (K - I) Z^\top`.

    Args:
        basis: `Z (d, k)`, orthonormal columns.
        core: `K (k, k)`, orthogonal.
        side: "input" or "output".
        dtype: to compute in; basis and core are kept in float64.

    Raises:
        TargetError: the shapes do not fit.

    Cost: a merge is `O(out in k)`.

    >>> turn = LowRankRotation(torch.eye(3)[:, :2], torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
    >>> turn.apply(torch.tensor([[0.0, 1.0, 5.0]])).tolist()
    [[1.0, 0.0, 5.0]]
    >>> [round(angle, 6) for angle in turn.power(0.5).angles().tolist()]
    [0.785398]
    """

    kind = "rotation"

    def __init__(self, basis: Tensor, core: Tensor, *, side: str = "input", dtype: torch.dtype = torch.float32) -> None:
        if side not in ("input", "output"):
            raise ValueError(f"side is 'input' or 'output', found {side!r}")
        if basis.dim() != 2 or core.shape != (basis.shape[1],) * 2:
            raise TargetError(f"a basis of shape {tuple(basis.shape)} and a core of shape {tuple(core.shape)}")
        require_working_dtype(dtype)
        self.basis = basis.to(torch.float64)
        self.core = core.to(torch.float64)
        self.side = side
        self.dtype = dtype
        self._basis = self.basis.to(dtype)
        self._change = (self.core - torch.eye(core.shape[0], dtype=torch.float64, device=core.device)).to(dtype)

    @property
    def rank(self) -> int:
        """The dimension of the span: the rank, at most, of `W' - W`."""
        return self.basis.shape[1]

    @property
    def row_multiple(self) -> int:
        """Any rows on the input side; the output side mixes all of them."""
        return 1 if self.side == "input" else 0

    @property
    def shape(self) -> Shape:
        """Fixed on the side that turns."""
        width = self.basis.shape[0]
        return (None, width) if self.side == "input" else (width, None)

    def to(self, dtype: torch.dtype) -> LowRankRotation:
        """The same rotation, computed in `dtype`."""
        return self if dtype == self.dtype else LowRankRotation(self.basis, self.core, side=self.side, dtype=dtype)

    def apply(self, weight: Tensor, first_row: int = 0) -> Tensor:
        """Rows of `W D`, or all of `D^T W`."""
        check_block(self, weight, first_row)
        left, right = self.to(weight.dtype)._factors(weight)
        return torch.addmm(weight, left, right)

    def inverse(self) -> LowRankRotation:
        """The same planes, turned back."""
        return self._with(self.core.T.contiguous())

    def power(self, alpha: float) -> LowRankRotation:
        r"""Turn every plane by `alpha` times its angle: `D^alpha`, with `D^a D^b = D^(a+b)`, always orthogonal.

        Where D turns several planes by pi, which ones they are is a choice; the same one for every alpha.

        Raises:
            TargetError: determinant -1, at an alpha other than 0 or 1.
        """
        if alpha == 1:
            return self
        if alpha == 0:
            return self._with(torch.eye(self.rank, dtype=torch.float64))
        return self._with(find_planes(self.core).power(alpha))

    def planes(self) -> Planes:
        """The planes of K, its angles among them; lift them to `R^d` by Z."""
        return find_planes(self.core)

    def as_low_rank(self, weight: Tensor, first_row: int = 0) -> tuple[Tensor, Tensor]:
        """`B (rows, k)`, `A (k, in)` with `W' = W + B A`, scale 1."""
        check_block(self, weight, first_row)
        left, right = self.to(weight.dtype)._factors(weight)
        return left, right.contiguous()

    def angles(self) -> Tensor:
        """One per plane, descending; pi for a bare reflection."""
        return plane_angles(self.core[None])

    def reflections(self, planes: Planes | None = None) -> Tensor:
        """Write the rotation as a chain of Householder reflections: two for each plane, a plain HRA adapter.

        `R(t) = H_a H_b` where `b` is the first direction of the plane and `a` lies half the angle from it. Planes that
        do not turn are left out.

        Args:
            planes: `planes()`, where they are at hand.

        Returns:
            `(d, m)`, unit columns, float64, the planes of largest angle first; `m` has the parity of the determinant.

        Reference: the theorem of Cartan and Dieudonne, plane by plane.

        >>> turn = LowRankRotation(torch.eye(3)[:, :2], torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
        >>> from ortho_cli.linalg.householder import Householder
        >>> bool(torch.allclose(Householder(turn.reflections()).apply(torch.eye(3).double()),
        ...     turn.apply(torch.eye(3).double())))
        True
        """
        found = self.planes() if planes is None else planes
        turning = found.angles > 0
        first, second = found.pairs[turning].unbind(-1)
        half = found.angles[turning, None] / 2
        ahead = half.cos() * first + half.sin() * second
        pairs = torch.stack([ahead, first], dim=1).flatten(0, 1)
        mirrored = found.axes[:, found.factors < 0].T
        vectors = self.basis @ torch.cat([pairs, mirrored]).T
        unit: Tensor = vectors / torch.linalg.vector_norm(vectors, dim=0)
        return unit

    def truncate(self, reflections: int) -> Truncated:
        """Keep the planes of largest angle, as many as fit in a number of reflections.

        Args:
            reflections: at least 0; a mirrored direction takes one, a plane two.

        Returns:
            The rotation and the exact error.
        """
        found = self.planes()
        mirror = found.axes[:, found.factors < 0][:, :reflections]
        kept = min((reflections - mirror.shape[1]) // 2, int((found.angles > NO_TURN).sum()))
        span = torch.cat([*found.pairs[:kept], mirror], dim=1)
        lost = (8 * (found.angles[kept:] / 2).sin().square()).sum() + 4 * ((found.factors < 0).sum() - mirror.shape[1])
        core = span.T @ self.core.cpu() @ span
        return Truncated(LowRankRotation(self.basis.cpu() @ span, core, side=self.side, dtype=self.dtype), sqrt(lost))

    def _factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        if self.side == "input":
            return (weight @ self._basis) @ self._change, self._basis.T
        return self._basis @ self._change.T, self._basis.T @ weight

    def _with(self, core: Tensor) -> LowRankRotation:
        return LowRankRotation(self.basis, core, side=self.side, dtype=self.dtype)


def chain_rotation(columns: Tensor, factor: Tensor, *, side: str, dtype: torch.dtype) -> LowRankRotation:
    """A chain of reflections `I - V T V^T` as a rotation of the span of V.

    Args:
        columns: `V (d, r)`, unit columns, float64.
        factor: `T (r, r)` of `wy_factor`.
        side: as there.
        dtype: to compute in.
    """
    basis, right = orthonormal_basis(columns)
    core = torch.eye(basis.shape[1], dtype=torch.float64, device=basis.device) - right @ factor @ right.T
    return LowRankRotation(basis, core, side=side, dtype=dtype)
