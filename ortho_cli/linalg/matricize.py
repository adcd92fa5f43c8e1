r"""The weight of any layer as a matrix (one per group) and back, and the two thin layers its factors stand for.

A convolution with kernel `W[o, i, p, q]` becomes :math:`A[(o, p), (i, q)]`: rows (output, vertical tap), columns
(input, horizontal tap). A factorisation `A = U VT` then is two convolutions: `VT` along the columns' taps first, `U`
along the rows' taps second. In one dimension all taps stand in the columns; in three the first (time) in the rows, so
that the pair is the well-known spatial, then temporal convolution. Groups are a batch of matrices of their own.
With no tap in the rows (`row_axes=0`, what OIALR decomposes) the pair is a thin convolution and a pointwise one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ortho_cli.errors import TargetError

__all__ = ["COMPAT", "KINDS", "Matricization"]

# conv1d is the transformers layer of that name: a Linear whose weight is stored as (in, out).
KINDS = ("linear", "embedding", "conv1d", "conv", "transposed")
COMPAT = ("raw-reshape",)


@dataclass(frozen=True)
class Matricization:
    """How the weight of one layer is seen as `batch` matrices `(rows, cols)`.

    Args:
        kind: "linear" `(out, in)`, "embedding" `(entries, width)`, "conv1d" (of transformers) `(in, out)`, "conv"
            `(out, in / groups, *kernel)`, "transposed" `(in, out / groups, *kernel)`.
        shape: of the weight.
        groups: of a convolution.
        row_axes: how many of a kernel's axes stand in the rows; None: half of them, rounded down.

    Raises:
        TargetError: a kind and a shape that do not fit together.

    Reference: FNL, arXiv:2105.01029, section 2.

    >>> conv = Matricization("conv", (32, 8, 3, 3), groups=2)
    >>> conv.batch, conv.rows, conv.cols
    (2, 48, 24)
    >>> Matricization("conv", (32, 8, 3, 3), row_axes=0).matrix_shape
    (32, 72)
    """

    kind: str
    shape: tuple[int, ...]
    groups: int = 1
    row_axes: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        spatial = self.kind in ("conv", "transposed")
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is none of {', '.join(KINDS)}")
        if len(self.shape) not in ((3, 4, 5) if spatial else (2,)):
            wanted = "three to five dimensions" if spatial else "two dimensions"
            raise TargetError(f"a {self.kind} weight has {wanted}, found shape {self.shape}")
        if self.groups < 1 or self.shape[0] % self.groups or (self.groups > 1 and not spatial):
            raise TargetError(f"a {self.kind} weight of shape {self.shape} does not go into {self.groups} groups")
        if self.row_axes is not None and not 0 <= self.row_axes <= len(self.kernel):
            raise TargetError(f"a {self.kind} weight of shape {self.shape} has no {self.row_axes} axes for its rows")

    @property
    def batch(self) -> int:
        """Matrices: one, or one a group."""
        return self.groups

    @property
    def rows(self) -> int:
        """Rows of each: outputs of a group times the row taps."""
        return self._outputs * prod(self._row_taps)

    @property
    def cols(self) -> int:
        """Columns of each: inputs of a group times the column taps."""
        return self._inputs * prod(self._col_taps)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """`(rows, cols)`, or `(groups, rows, cols)` where there are several groups."""
        return (self.rows, self.cols) if self.groups == 1 else (self.groups, self.rows, self.cols)

    @property
    def parameters(self) -> int:
        """Entries of the weight."""
        return prod(self.shape)

    def to_matrix(self, weight: Tensor, compat: str | None = None) -> Tensor:
        """See the weight as a matrix.

        Args:
            weight: of `shape`.
            compat: "raw-reshape" is what the paper's code decomposes: `(out, in, kh, kw)` read row by row as
                `(out kh, in kw)`. Its factors do not give the convolution back (only values drawn independently do not
                care), so it serves to repeat the paper's initial values and nothing else.

        Returns:
            `matrix_shape`; a view where strides allow, differentiable.

        Raises:
            TargetError: a weight of another shape; groups with "raw-reshape".

        >>> weight = torch.arange(8.0).view(2, 1, 2, 2)
        >>> Matricization("conv", (2, 1, 2, 2)).to_matrix(weight).tolist()
        [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]]
        """
        self._check(weight, self.shape)
        if compat is not None:
            if compat not in COMPAT:
                raise ValueError(f"compat {compat!r} is none of {', '.join(COMPAT)}")
            if self.kind != "conv" or self.groups > 1:
                raise TargetError(
                    f"{compat} is defined for plain convolutions, found {self.kind}, groups {self.groups}"
                )
            return weight.reshape(self.rows, self.cols)
        if self.kind in ("linear", "embedding"):
            return weight
        if self.kind == "conv1d":
            return weight.mT
        if self.kind == "conv":
            blocks = weight.reshape(self.groups, self._outputs, self._inputs, *self.kernel)
        else:
            blocks = weight.reshape(self.groups, self._inputs, self._outputs, *self.kernel).transpose(1, 2)
        # (group, out, in, row taps, column taps) -> (group, out, row taps, in, column taps)
        return torch.movedim(blocks, 2, 2 + len(self._row_taps)).reshape(self.matrix_shape)

    def to_weight(self, matrix: Tensor) -> Tensor:
        """Undo :meth:`to_matrix` (its correct form, which is what a layer computes with).

        >>> layer = Matricization("transposed", (4, 3, 2, 5), groups=2)
        >>> weight = torch.randn(4, 3, 2, 5)
        >>> torch.equal(layer.to_weight(layer.to_matrix(weight)), weight)
        True
        """
        self._check(matrix, self.matrix_shape)
        if self.kind in ("linear", "embedding"):
            return matrix
        if self.kind == "conv1d":
            return matrix.mT
        blocks = matrix.reshape(self.groups, self._outputs, *self._row_taps, self._inputs, *self._col_taps)
        blocks = torch.movedim(blocks, 2 + len(self._row_taps), 2)
        return (blocks if self.kind == "conv" else blocks.transpose(1, 2)).reshape(self.shape)

    def stack(self, u: Tensor, vt: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of all groups as two matrices, the form they are stored in.

        Args:
            u: `(rows, r)` or `(groups, rows, r)`.
            vt: `(r, cols)` or `(groups, r, cols)`.

        Returns:
            `U (groups rows, r)` and `VT (groups r, cols)`.
        """
        return u.reshape(-1, u.shape[-1]), vt.reshape(-1, vt.shape[-1])

    def unstack(self, u: Tensor, vt: Tensor) -> tuple[Tensor, Tensor]:
        """Undo :meth:`stack`."""
        if self.groups == 1:
            return u, vt
        return u.reshape(self.groups, self.rows, -1), vt.reshape(self.groups, -1, self.cols)

    def thin_kernels(self, u: Tensor, vt: Tensor) -> tuple[Tensor, Tensor]:
        """Kernels of the two thin convolutions that apply `U VT`: first along the columns' taps, then the rows'.

        Both take the groups of the whole; stride, padding and dilation go through :meth:`split_spatial`, the bias to
        the second. For a transposed convolution both are transposed ones.

        Args:
            u: `(groups rows, r)`, as stored.
            vt: `(groups r, cols)`.

        Returns:
            "conv": `(groups r, in / groups, 1, kw)` and `(out, r, kh, 1)`; "transposed": `(in, r, 1, kw)` and
            `(groups r, out / groups, kh, 1)`. Views where strides allow, differentiable.
        """
        g, r = self.groups, u.shape[-1]
        ones_row, ones_col = (1,) * len(self._row_taps), (1,) * len(self._col_taps)
        first = vt.reshape(g, r, self._inputs, *ones_row, *self._col_taps)
        second = torch.movedim(u.reshape(g, self._outputs, *self._row_taps, r), -1, 2)
        second = second.reshape(g, self._outputs, r, *self._row_taps, *ones_col)
        if self.kind == "transposed":
            first, second = first.transpose(1, 2), second.transpose(1, 2)
        return first.flatten(0, 1), second.flatten(0, 1)

    def split_spatial(self, values: Sequence[int], neutral: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Deal a stride, padding or dilation out to the two thin convolutions.

        Args:
            values: one for each spatial dimension.
            neutral: what the other convolution gets: 1 for stride and dilation, 0 for paddings.

        >>> Matricization("conv", (8, 8, 3, 3)).split_spatial((2, 5), neutral=1)
        ((1, 5), (2, 1))
        """
        cut, dims = len(self._row_taps), len(self.kernel)
        values = tuple(values)
        return (neutral,) * cut + values[cut:], values[:cut] + (neutral,) * (dims - cut)

    @property
    def kernel(self) -> tuple[int, ...]:
        """Taps of a convolution, () for the rest."""
        return self.shape[2:]

    @property
    def _row_taps(self) -> tuple[int, ...]:
        return self.kernel[: self._cut]

    @property
    def _col_taps(self) -> tuple[int, ...]:
        return self.kernel[self._cut :]

    @property
    def _cut(self) -> int:
        return len(self.kernel) // 2 if self.row_axes is None else self.row_axes

    @property
    def _outputs(self) -> int:
        """Outputs of one group."""
        return self.shape[0] // self.groups if self.kind not in ("conv1d", "transposed") else self.shape[1]

    @property
    def _inputs(self) -> int:
        """Inputs of one group."""
        return self.shape[1] if self.kind not in ("conv1d", "transposed") else self.shape[0] // self.groups

    @staticmethod
    def _check(tensor: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != shape:
            raise TargetError(f"expected a tensor of shape {shape}, found {tuple(tensor.shape)}")
