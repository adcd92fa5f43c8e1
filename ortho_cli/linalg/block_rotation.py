"""Orthogonal maps of a weight in blocks (OFT), and scaling of its rows.

`cayley.py` makes the blocks from stored parameters; here they meet the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ortho_cli.errors import NumericsError, TargetError
from ortho_cli.linalg.operator import Shape, check_block, no_low_rank
from ortho_cli.linalg.planes import find_planes, orthogonality_defect, plane_angles
from ortho_cli.linalg.precision import adapter_tensor, require_working_dtype

__all__ = ["BlockRotation", "Rescale"]

# A truncated Cayley series is normal, so its eigenvalues still tell the angles of its nearest rotation; but beyond this
# defect it stretches the weight's singular values by more than half a percent, and to call it a rotation would mislead.
NEARLY_ORTHOGONAL = 1e-2


class BlockRotation:
    r"""Multiply one side of a weight by a block-diagonal rotation (OFT), transposed as the tools do.

    Input side (PEFT): :math:`W' = W\,\mathrm{diag}(R_1, \dots, R_n)^\top`; output side (kohya, LyCORIS diag-OFT):
    :math:`W' = \mathrm{diag}(R_1, \dots, R_n)^\top W`. `R` is as their code computes it (`cayley`, `cayley_neumann`,
    `diag_oft`). The two sides are different models: one cannot be renamed into the other.

    Args:
        blocks: `R (n, b, b)`, any float type; `n b` is the width of the side.
        side: "input" or "output".
        shared: one block serves the whole side (`block_share`); `n` must be 1.

    Raises:
        TargetError: the blocks are not square, or several are given as shared.
        NumericsError: a non-finite value.

    Cost: `O(out in b)`.
    Reference: OFT, arXiv:2306.07280; PEFT `tuners/oft/layer.py`; kohya `networks/oft.py`.

    >>> turn = torch.tensor([[[0.0, -1.0], [1.0, 0.0]]])
    >>> BlockRotation(turn).apply(torch.tensor([[1.0, 0.0]])).tolist()
    [[0.0, 1.0]]
    >>> BlockRotation(turn, side="output").apply(torch.tensor([[1.0], [0.0]])).tolist()
    [[0.0], [-1.0]]
    """

    kind = "oft"
    rank = None

    def __init__(self, blocks: Tensor, *, side: str = "input", shared: bool = False) -> None:
        if side not in ("input", "output"):
            raise ValueError(f"side is 'input' or 'output', found {side!r}")
        if blocks.dim() != 3 or blocks.shape[1] != blocks.shape[2] or 0 in blocks.shape:
            raise TargetError(f"rotation blocks of shape {tuple(blocks.shape)}, expected (blocks, b, b)")
        if shared and blocks.shape[0] != 1:
            raise TargetError(f"{blocks.shape[0]} rotation blocks in an adapter that shares one")
        self.blocks = adapter_tensor(blocks, "rotation blocks")
        self.side = side
        self.shared = shared
        self.block = blocks.shape[1]

    @property
    def row_multiple(self) -> int:
        """Any rows on the input side, whole blocks on the output side."""
        return 1 if self.side == "input" else self.block

    @property
    def shape(self) -> Shape:
        """Fixed on the side that turns, unless the block is shared."""
        width = None if self.shared else self.blocks.shape[0] * self.block
        return (None, width) if self.side == "input" else (width, None)

    def to(self, dtype: torch.dtype) -> BlockRotation:
        """The same blocks, rounded to `dtype`."""
        require_working_dtype(dtype)
        return self if dtype == self.blocks.dtype else self._with(self.blocks.to(dtype))

    def apply(self, weight: Tensor, first_row: int = 0) -> Tensor:
        """Rows of `W'`; on the output side the blocks are those of the given rows."""
        check_block(self, weight, first_row)
        blocks = self.to(weight.dtype).blocks
        rows, columns = weight.shape
        if self.side == "output":
            start, count = first_row // self.block, rows // self.block
            chosen = blocks if self.shared else blocks[start : start + count]
            return (chosen.mT @ weight.reshape(count, self.block, columns)).reshape(rows, columns)
        if columns % self.block:
            raise TargetError(
                f"an oft adapter with a shared block of {self.block} does not divide a width of {columns}",
                hint="it was made for another layer or another base",
            )
        pieces = weight.reshape(rows, columns // self.block, self.block).transpose(0, 1)
        return (pieces @ blocks.mT).transpose(0, 1).reshape(rows, columns)

    def inverse(self) -> BlockRotation:
        """The inverse blocks, solved in float64: exact for a truncated series too, the transpose for a rotation.

        Raises:
            NumericsError: a block is singular.
        """
        inverse, info = torch.linalg.inv_ex(self.blocks.to(torch.float64))
        if bool((info != 0).any()):
            raise NumericsError("an oft adapter holds a singular block: it cannot be undone")
        return self._with(inverse.to(self.blocks.dtype))

    def power(self, alpha: float) -> BlockRotation:
        """Every plane of every block turned by `alpha` times its angle (a truncated series stretches, likewise shared).

        Raises:
            TargetError: a block mirrors a direction, at an alpha other than 0 or 1.
        """
        if alpha == 1:
            return self
        powers = torch.stack([find_planes(block).power(alpha) for block in self.blocks])
        return self._with(powers.to(self.blocks))

    def as_low_rank(self, weight: Tensor, first_row: int = 0) -> tuple[Tensor, Tensor]:
        """There is none: block rotations change a weight at full rank."""
        raise no_low_rank(self)

    def angles(self) -> Tensor | None:
        """All planes of all blocks (a shared block counts once), float64, descending.

        For a truncated series, those of the nearest rotation. None where the blocks are further than
        `NEARLY_ORTHOGONAL` from orthogonal (a large `Q`): it stretches too, and no angle says how much.
        """
        return plane_angles(self.blocks) if orthogonality_defect(self.blocks) <= NEARLY_ORTHOGONAL else None

    def _with(self, blocks: Tensor) -> BlockRotation:
        return BlockRotation(blocks, side=self.side, shared=self.shared)


class Rescale:
    """Multiply each output row by its own factor: `rescale` of LyCORIS diag-OFT, `boft_s` of PEFT's BOFT.

    Both tools apply it after the rotation: `Chain((BlockRotation(...), Rescale(factors)))`.

    Args:
        factors: one number per output row, in any shape of that many elements (`(out, 1)`, `(out, 1, 1, 1)`).

    Raises:
        NumericsError: a non-finite value.

    >>> Rescale(torch.tensor([[2.0], [3.0]])).apply(torch.ones(2, 2)).tolist()
    [[2.0, 2.0], [3.0, 3.0]]
    """

    kind = "rescale"
    rank = None
    row_multiple = 1

    def __init__(self, factors: Tensor) -> None:
        self.factors = adapter_tensor(factors, "row factors").reshape(-1)
        self.shape: Shape = (self.factors.shape[0], None)

    def to(self, dtype: torch.dtype) -> Rescale:
        """The same factors, rounded to `dtype`."""
        require_working_dtype(dtype)
        return self if dtype == self.factors.dtype else Rescale(self.factors.to(dtype))

    def apply(self, weight: Tensor, first_row: int = 0) -> Tensor:
        """The rows times their factors."""
        check_block(self, weight, first_row)
        return weight * self.factors[first_row : first_row + weight.shape[0], None].to(weight.dtype)

    def inverse(self) -> Rescale:
        """The reciprocals.

        Raises:
            TargetError: a factor is zero, its row is lost.
        """
        if bool((self.factors == 0).any()):
            raise TargetError("a row factor of the adapter is zero: the row it erased cannot be restored")
        return Rescale(1 / self.factors)

    def power(self, alpha: float) -> Rescale:
        """The factors to the power of `alpha`.

        Raises:
            TargetError: a factor is not positive, at an alpha other than 0 or 1.
        """
        if alpha not in (0, 1) and bool((self.factors <= 0).any()):
            raise TargetError("a row factor of the adapter is not positive: it has no strengths between 0 and 1")
        return Rescale(self.factors**alpha)

    def as_low_rank(self, weight: Tensor, first_row: int = 0) -> tuple[Tensor, Tensor]:
        """There is none: every row changes."""
        raise no_low_rank(self)

    def angles(self) -> None:
        """None: it stretches."""
        return None
