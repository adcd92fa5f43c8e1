"""The HRA adapter as an operator: a chain of Householder reflections on one side of a weight.

Input side `W' = W D`, output side `W' = D^T W`, `D = H_1 ... H_r`. Merging, undoing, exporting as LoRA and measuring
angles all work on `V (d, r)` and `T (r, r)` of `reflections.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ortho_cli.errors import TargetError
from ortho_cli.linalg.operator import Operator, Shape, check_block
from ortho_cli.linalg.precision import adapter_tensor, require_working_dtype
from ortho_cli.linalg.reflections import SIDES, normalize, orthonormalize, wy_apply, wy_factor
from ortho_cli.linalg.rotation import LowRankRotation, chain_rotation

__all__ = ["Householder"]


class Householder:
    r"""Rotate one side of a weight by a chain of Householder reflections (HRA).

    `W'` has the singular values of `W`. As a LoRA it is exact at rank `r`: input side `B = -W V T`, `A = V^T`; output
    side `B = -V T^T`, `A = V^T W`; right only for the base it was computed from, while the rotation itself fits any.

    Args:
        vectors: `(in, r)`, on the output side `(out, r)`; half types are raised to float32.
        side: "input" (PEFT, the HRA repository) or "output" (its LLaMA variant `oft_r`).
        eps: `> 0` for the soft form :math:`u / \sqrt{\|u\|^2 + \epsilon}`: not orthogonal, so no inverse, no angles.
        gram_schmidt: use an orthonormal basis of the columns' span (`apply_GS`): :math:`D = I - 2 Q Q^\top`.

    Raises:
        NumericsError: a zero or non-finite column; dependent columns under `gram_schmidt`.
        TargetError: more reflections than the side is wide.

    Cost: a merge is `O(out in r)`; no `in x in` matrix is formed.
    Reference: HRA, arXiv:2405.17484.

    >>> op = Householder(torch.tensor([[0.0], [2.0]]))
    >>> op.apply(torch.tensor([[3.0, 4.0]])).tolist()
    [[3.0, -4.0]]
    >>> op.angles().tolist()
    [3.141592653589793]
    """

    kind = "hra"

    def __init__(self, vectors: Tensor, *, side: str = "input", eps: float = 0.0, gram_schmidt: bool = False) -> None:
        if side not in SIDES:
            raise ValueError(f"side is 'input' or 'output', found {side!r}")
        if eps and gram_schmidt:
            raise ValueError("the Gram-Schmidt variant has no soft form: eps must be 0")
        self.vectors = adapter_tensor(vectors, "reflection vectors")
        self.side = side
        self.eps = eps
        self.gram_schmidt = gram_schmidt
        self._columns = orthonormalize(self.vectors) if gram_schmidt else normalize(self.vectors, eps)
        self._factor = wy_factor(self._columns)

    @property
    def rank(self) -> int:
        """The number of reflections."""
        return self.vectors.shape[1]

    @property
    def row_multiple(self) -> int:
        """Any rows on the input side; the output side mixes all of them."""
        return 1 if self.side == "input" else 0

    @property
    def shape(self) -> Shape:
        """Fixed on the side that turns."""
        width = self.vectors.shape[0]
        return (None, width) if self.side == "input" else (width, None)

    def to(self, dtype: torch.dtype) -> Householder:
        """The chain of the same vectors, normalised and factored in `dtype`."""
        require_working_dtype(dtype)
        return self if dtype == self.vectors.dtype else self._with(self.vectors.to(dtype))

    def apply(self, weight: Tensor, first_row: int = 0) -> Tensor:
        """Rows of `W D`, or all of `D^T W`."""
        check_block(self, weight, first_row)
        chain = self.to(weight.dtype)
        return wy_apply(weight, chain._columns, chain._factor, self.side)

    def inverse(self) -> Householder:
        """The reflections in reverse order; the Gram-Schmidt form is its own inverse.

        Raises:
            TargetError: the soft form is not orthogonal.
        """
        if self.eps:
            raise TargetError(
                f"an eps-soft HRA adapter (eps {self.eps:g}) is not orthogonal: it cannot be undone by reflections",
                hint="keep the base, or an exported LoRA, whose product can be subtracted",
            )
        return self if self.gram_schmidt else self._with(self.vectors.flip(1))

    def as_low_rank(self, weight: Tensor, first_row: int = 0) -> tuple[Tensor, Tensor]:
        """`B (rows, r)`, `A (r, in)` with `W' = W + B A`, scale 1 (a LoRA of alpha = r)."""
        check_block(self, weight, first_row)
        chain = self.to(weight.dtype)
        if self.side == "input":
            return -(weight @ chain._columns) @ chain._factor, chain._columns.T.contiguous()
        return -chain._columns @ chain._factor.T, chain._columns.T @ weight

    def angles(self) -> Tensor | None:
        """Angles of `D` from its `r x r` core; an odd chain has one bare reflection, pi. None for the soft form.

        Cost: `O(d r^2)`, in float64 whatever the vectors' dtype.
        """
        return None if self.eps else self.rotation().angles()

    def rotation(self) -> LowRankRotation:
        """The chain as a rotation of the span of its vectors, float64 inside (a paired start spans r/2 directions).

        Raises:
            TargetError: the soft form is not orthogonal.
        """
        if self.eps:
            raise TargetError(
                f"an eps-soft HRA adapter (eps {self.eps:g}) is not orthogonal: it is no rotation",
                hint="0 and 1 are its only strengths; an exported LoRA scales linearly",
            )
        chain = self.to(torch.float64)
        return chain_rotation(chain._columns, chain._factor, side=self.side, dtype=self.vectors.dtype)

    def power(self, alpha: float) -> Operator:
        """Every plane turned by `alpha` times its angle; see `LowRankRotation.power`.

        Raises:
            TargetError: an odd number of reflections, or the soft form, at an alpha other than 0 or 1.
        """
        if alpha == 1:
            return self
        if alpha == 0:
            nothing = self.vectors.new_zeros(self.vectors.shape[0], 0)
            return LowRankRotation(nothing, nothing[:0], side=self.side, dtype=self.vectors.dtype)
        return self.rotation().power(alpha)

    def _with(self, vectors: Tensor) -> Householder:
        return Householder(vectors, side=self.side, eps=self.eps, gram_schmidt=self.gram_schmidt)
