"""Layers with a frozen basis and a trained core, `W = U M VT`: OIALR's form of linear layers and convolutions.

`U` and `VT` are orthonormal and get no gradient, so that a training step multiplies activations by three thin matrices
and needs neither the gradient of a whole weight nor the layer's input once more. Where that is no less work (a rank
above break-even), the product is formed and the layer applied as one.
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ortho_cli.errors import NumericsError

from .factorized_base import FactorizedLayer, matricization
from .factorized_conv import FactorizedConv
from .factorized_layers import FactorizedLinear

__all__ = ["ROW_AXES", "BasisConv", "BasisLayer", "BasisLinear", "basis_layer", "decompose", "step_cost"]

ROW_AXES = 0  # a convolution is the matrix (out, in * taps), whose core is smaller than that of (out * kh, in * kw)


def basis_layer(base: nn.Module, rank: int | None = None) -> BasisLayer:
    """Make the form of a layer with a frozen basis; the basis is zeros, to be filled or loaded.

    Args:
        base: Linear, transformers' Conv1D, or a convolution (1-d to 3-d, grouped).
        rank: of the core; None: the full one.

    Raises:
        TargetError: a layer that has no such form; with the reason.

    >>> layer = basis_layer(nn.Conv2d(4, 6, 3, padding=1))
    >>> [tuple(part.shape) for part in (layer.U, layer.M, layer.VT)]
    [(6, 6), (6, 6), (6, 36)]
    >>> [name for name, part in layer.named_parameters() if part.requires_grad]
    ['bias', 'M']
    """
    form = matricization(base, ROW_AXES)
    kind = BasisConv if form.kind == "conv" else BasisLinear
    return kind(base, min(form.rows, form.cols) if rank is None else rank)


def decompose(matrix: Tensor, what: str) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD in at least float32, `(..., m, k)`, `(..., k)`, `(..., k, n)`.

    Raises:
        NumericsError: a value that is not finite.
    """
    matrix = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
    if not bool(torch.isfinite(matrix).all()):
        raise NumericsError(f"{what} has values that are not finite", hint="lower the learning rate or clip gradients")
    u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u.contiguous(), values, vt.contiguous()


def step_cost(rows: int, cols: int, rank: int, places: int, *, training: bool) -> tuple[int, int]:
    """Multiply-adds of a layer by its three parts, and as one with the product for its weight.

    Args:
        rows: of the layer's matrix.
        cols: of the layer's matrix.
        rank: of its core.
        places: vectors that are multiplied: tokens, or places of a convolution's output.
        training: with the backward pass: input and core get gradients, in the one form through the whole weight.

    >>> round(step_cost(768, 768, 115, 4096, training=True)[0] / (3 * 4096 * 768 * 768), 3)
    0.222
    """
    twice, thrice = (2, 3) if training else (1, 1)
    parts = places * rank * (twice * (rows + cols) + thrice * rank)
    product = rank * (min(rows, cols) * rank + rows * cols)
    return parts, thrice * places * rows * cols + twice * product


class BasisLayer(FactorizedLayer):
    """What linear layers and convolutions with a frozen basis are."""

    M: nn.Parameter

    def __init__(self, base: nn.Module, rank: int) -> None:
        super().__init__(base, rank, square=True, row_axes=ROW_AXES)
        self.U.requires_grad_(False)
        self.VT.requires_grad_(False)

    @torch.no_grad()
    def set_parts(self, u: Tensor, values: Tensor, vt: Tensor) -> None:
        """Take a basis, and for the core the diagonal of singular values; all new parameters, of any rank.

        Args:
            u: `(rows, r)`, with groups `(groups, rows, r)`.
            values: `(r)` or `(groups, r)`.
            vt: `(r, cols)` or `(groups, r, cols)`.
        """
        core = torch.diag_embed(values).reshape(-1, values.shape[-1])
        for name, value in zip(("U", "VT", "M"), (*self.form.stack(u, vt), core), strict=True):
            old = getattr(self, name)
            setattr(self, name, nn.Parameter(value.to(old.dtype).contiguous(), requires_grad=old.requires_grad))
        self.rank = values.shape[-1]

    @torch.no_grad()
    def set_rank(self, rank: int) -> None:
        """Take zeros of another rank, to be loaded."""
        groups = () if self.form.groups == 1 else (self.form.groups,)
        zeros = self.U.new_zeros
        self.set_parts(zeros(*groups, self.form.rows, rank), zeros(*groups, rank), zeros(*groups, rank, self.form.cols))

    def cores(self) -> Tensor:
        """The core, `(r, r)` or `(groups, r, r)`."""
        return self.M if self.form.groups == 1 else self.M.view(self.form.groups, self.rank, self.rank)

    def forms_product(self, places: int) -> bool:
        """Whether forming the weight is less work for this many vectors."""
        parts, whole = step_cost(
            self.form.rows, self.form.cols, self.rank, places, training=torch.is_grad_enabled()
        )  # fmt: skip
        return whole < parts


class BasisLinear(BasisLayer, FactorizedLinear):
    """`x -> U (M (VT x)) + bias`, for Linear and transformers' Conv1D.

    >>> layer = basis_layer(nn.Linear(6, 4), rank=2)
    >>> layer(torch.randn(3, 6)).shape
    torch.Size([3, 4])
    """

    def forward(self, inputs: Tensor) -> Tensor:
        return self.rows_of(inputs, slice(None))

    def rows_of(self, inputs: Tensor, rows: slice) -> Tensor:
        """Some of the outputs, without computing the others; `rows` of U and bias."""
        bias = None if self.bias is None else self.bias[rows]
        if self.forms_product(inputs.numel() // self.form.cols):
            u, vt = self.pair()
            return F.linear(inputs, u[rows] @ vt, bias)
        return F.linear(F.linear(F.linear(inputs, self.VT), self.M), self.U[rows], bias)


class BasisConv(BasisLayer, FactorizedConv):
    """A thin convolution, the core and a pointwise convolution, or the whole one.

    >>> layer = basis_layer(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), rank=2)
    >>> layer(torch.randn(1, 4, 8, 8)).shape
    torch.Size([1, 6, 4, 4])
    """

    def forward(self, inputs: Tensor) -> Tensor:
        if self._pad is not None:
            inputs = F.pad(inputs, self._pad, self._pad_mode)
        groups, dims = self.form.groups, len(self.form.kernel)
        after = self._places_after(inputs.shape[-dims:], self._thin[0], 0)
        if self.forms_product(prod(after) * (1 if inputs.dim() == dims + 1 else len(inputs))):
            return self._convolve(inputs, self.weight, self.bias, groups=groups, **self._whole)
        first, second = self.form.thin_kernels(self.U, self.VT)
        hidden = self._convolve(inputs, first, groups=groups, **self._thin[0])
        hidden = self._convolve(hidden, self.M.reshape(*self.M.shape, *(1,) * dims), groups=groups)
        return self._convolve(hidden, second, self.bias, groups=groups, **self._thin[1])
