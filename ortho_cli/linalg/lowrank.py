"""Adapters that add to a weight, `W' = W + delta`, and the plainest of them: LoRA.

LoHa and LoKr, whose delta is a product of another kind, are in `kronecker.py`; DoRA, which normalises the sum, in
`dora.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ortho_cli.errors import TargetError
from ortho_cli.linalg.operator import check_block, no_low_rank
from ortho_cli.linalg.precision import adapter_tensors, require_working_dtype

__all__ = ["Additive", "LowRank", "fold_core"]


def fold_core(core: Tensor, factor: Tensor) -> Tensor:
    r"""Multiply a Tucker core into its input factor, so that a factored convolution becomes two plain matrices.

    LoCon's `lora_mid`, LoHa's `hada_t1`, `hada_t2` and LoKr's `lokr_t2` all mean
    :math:`\sum_{ij} a_{pi} c_{ijkl} b_{jr}`; what is returned is the part right of `a`.

    Args:
        core: `c (r1, r2, kh, kw)`.
        factor: `b (r2, in)`, or with trailing dimensions of size 1.

    Returns:
        `(r1, in * kh * kw)`, columns in the order of a convolution weight.

    Raises:
        TargetError: the ranks do not chain.

    Reference: LyCORIS `functional/general.py` (`rebuild_tucker`); PEFT `tuners/lokr/layer.py`.

    >>> fold_core(torch.ones(1, 2, 1, 3), torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist()
    [[4.0, 4.0, 4.0, 6.0, 6.0, 6.0]]
    """
    factor = factor.reshape(factor.shape[0], -1)
    if core.dim() < 3 or core.shape[1] != factor.shape[0]:
        raise TargetError(
            f"a core of shape {tuple(core.shape)} and a factor of shape {tuple(factor.shape)} do not chain"
        )
    return torch.einsum("ij...,jr->ir...", core, factor).reshape(core.shape[0], -1)


class Additive(ABC):
    """What LoRA, LoHa and LoKr share: rows of `delta` on demand, an inverse by sign, no angles."""

    kind: str
    row_multiple = 1
    scale: float
    shape: tuple[int, int]

    @property
    @abstractmethod
    def rank(self) -> int | None:
        """Rank bound of the delta, None where it is not small."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """What the factors are stored in."""

    @abstractmethod
    def rebuilt(self, dtype: torch.dtype, scale: float) -> Additive:
        """The same factors in another dtype, at another scale."""

    @abstractmethod
    def add(self, weight: Tensor, rows: slice) -> Tensor:
        """`weight + delta[rows]`, all in the dtype of the factors."""

    @abstractmethod
    def factors(self, rows: slice) -> tuple[Tensor, Tensor]:
        """`B` (these rows of it, scale included) and `A` with `delta = B A`; called only where `rank` is known."""

    def to(self, dtype: torch.dtype) -> Additive:
        """The same adapter with factors in `dtype`; products of factors are formed anew."""
        require_working_dtype(dtype)
        return self if dtype == self.dtype else self.rebuilt(dtype, self.scale)

    def apply(self, weight: Tensor, first_row: int = 0) -> Tensor:
        """Rows of `W + delta`."""
        check_block(self, weight, first_row)
        return self.to(weight.dtype).add(weight, slice(first_row, first_row + weight.shape[0]))

    def inverse(self) -> Additive:
        """The same delta, subtracted."""
        return self.rebuilt(self.dtype, -self.scale)

    def power(self, alpha: float) -> Additive:
        """A share of the delta."""
        return self.rebuilt(self.dtype, self.scale * alpha)

    def as_low_rank(self, weight: Tensor, first_row: int = 0) -> tuple[Tensor, Tensor]:
        """`B (rows, k)` and `A (k, in)` of the delta; `weight` gives only the rows and the dtype."""
        check_block(self, weight, first_row)
        if self.rank is None:
            raise no_low_rank(self)
        return self.to(weight.dtype).factors(slice(first_row, first_row + weight.shape[0]))

    def angles(self) -> None:
        """None: a sum is no rotation."""
        return None


class LowRank(Additive):
    r"""Add a low-rank product to a weight (LoRA): :math:`W' = W + s\,B A`.

    Serves LoCon as well: convolution factors are taken as stored; with `lora_mid`, give `fold_core(mid, down)`.

    Args:
        up: `B (out, r)`, a conv `(out, r, 1, 1)`, any float type.
        down: `A (r, in)`, a conv `(r, in, kh, kw)`.
        scale: `s = alpha / r`, for rsLoRA `alpha / sqrt(r)`: the caller knows which.

    Raises:
        TargetError: the factors do not chain.
        NumericsError: a non-finite value.

    Cost: a merge is `O(out in r)`.
    Reference: LoRA, arXiv:2106.09685; rsLoRA, arXiv:2312.03732.

    >>> LowRank(torch.ones(2, 1), torch.ones(1, 3), scale=0.5).apply(torch.zeros(2, 3)).tolist()
    [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
    """

    kind = "lora"

    def __init__(self, up: Tensor, down: Tensor, scale: float = 1.0) -> None:
        left, right = adapter_tensors("LoRA factors", up, down)
        self.up, self.down = left.reshape(up.shape[0], -1), right.reshape(down.shape[0], -1)
        if self.up.shape[1] != self.down.shape[0]:
            raise TargetError(f"LoRA factors of shapes {tuple(up.shape)} and {tuple(down.shape)} do not chain")
        self.scale = scale
        self.shape = (self.up.shape[0], self.down.shape[1])

    @property
    def rank(self) -> int:
        """The inner dimension of the factors."""
        return self.down.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """What the factors are stored in."""
        return self.down.dtype

    def rebuilt(self, dtype: torch.dtype, scale: float) -> LowRank:
        """The same factors in another dtype, at another scale."""
        return LowRank(self.up.to(dtype), self.down.to(dtype), scale)

    def add(self, weight: Tensor, rows: slice) -> Tensor:
        """`weight + s B[rows] A`."""
        return torch.addmm(weight, self.up[rows], self.down, alpha=self.scale)

    def factors(self, rows: slice) -> tuple[Tensor, Tensor]:
        """`s B[rows]` and `A`."""
        return self.up[rows] * self.scale, self.down
