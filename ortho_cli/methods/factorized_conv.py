"""Convolutions by factors: two thin ones, or the whole one with the product for its kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .factorized_base import FactorizedLayer

__all__ = ["FactorizedConv"]

CONVOLVE: dict[tuple[bool, int], Callable[..., Tensor]] = {
    (False, 1): F.conv1d, (False, 2): F.conv2d, (False, 3): F.conv3d,
    (True, 1): F.conv_transpose1d, (True, 2): F.conv_transpose2d, (True, 3): F.conv_transpose3d,
}  # fmt: skip
# Settings of a convolution, one value for each axis, with the value that leaves an axis alone.
NEUTRAL = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0}


class FactorizedConv(FactorizedLayer):
    """Two thin convolutions, `VT` along the columns' taps and then `U` along the rows', or the whole one.

    Which of the two is less work is counted in multiply-adds for each input's size. Transposed convolutions become two
    transposed ones; `output_size` is not taken.

    >>> import torch
    >>> from ortho_cli.methods.factorized_layers import factorized_layer
    >>> layer = factorized_layer(nn.Conv2d(4, 6, 3, stride=2, padding=1), rank=2)
    >>> layer(torch.randn(1, 4, 8, 8)).shape
    torch.Size([1, 6, 4, 4])
    """

    def __init__(self, base: nn.Module, rank: int, *, square: bool = False, row_axes: int | None = None) -> None:
        super().__init__(base, rank, square=square, row_axes=row_axes)
        conv: Any = base
        self.transposed = self.form.kind == "transposed"
        self._convolve = CONVOLVE[self.transposed, len(self.form.kernel)]
        # What a convolution cannot pad by itself (other values than zeros; "same", perhaps uneven) is padded before.
        padded = conv.padding_mode != "zeros" or isinstance(conv.padding, str)
        self._pad = tuple(conv._reversed_padding_repeated_twice) if padded else None
        self._pad_mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        padding = (0,) * len(self.form.kernel) if padded else conv.padding
        self._whole: dict[str, Any] = {"stride": conv.stride, "padding": padding, "dilation": conv.dilation}
        if self.transposed:
            self._whole["output_padding"] = conv.output_padding
        self._thin = self._split(self._whole)

    def forward(self, inputs: Tensor) -> Tensor:
        if self._pad is not None:
            inputs = F.pad(inputs, self._pad, self._pad_mode)
        groups = self.form.groups
        if self.prefers_whole(inputs.shape):
            return self._convolve(inputs, self.weight, self.bias, groups=groups, **self._whole)
        first, second = self.form.thin_kernels(*self.pair())
        hidden = self._convolve(inputs, first, groups=groups, **self._thin[0])
        return self._convolve(hidden, second, self.bias, groups=groups, **self._thin[1])

    def prefers_whole(self, shape: Sequence[int]) -> bool:
        """Whether the product and one whole convolution take fewer multiply-adds than two thin convolutions.

        Args:
            shape: of the (padded) input, with or without a batch.
        """
        rows, cols, rank = self.form.rows, self.form.cols, self.rank
        dims = len(self.form.kernel)
        batch = 1 if len(shape) == dims + 1 else shape[0]
        between = self._places_after(shape[-dims:], self._thin[0], 0)
        after = self._places_after(between, self._thin[1], 1)
        if self.transposed:  # each place of the input is multiplied, not each of the output
            whole, thin = prod(shape[-dims:]), prod(shape[-dims:]) * cols + prod(between) * rows
        else:
            whole, thin = prod(after), prod(between) * cols + prod(after) * rows
        return rows * cols * (rank + batch * whole) < batch * rank * thin

    def _split(self, whole: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The settings of the two thin convolutions; where the second is pointwise, the first makes all steps."""
        pointwise = not self.transposed and prod(self._taps(1)) == 1
        first, second = {}, {}
        for name, values in whole.items():
            neutral = NEUTRAL[name]
            pair = (values, (neutral,) * len(values)) if pointwise else self.form.split_spatial(values, neutral)
            first[name], second[name] = pair
        return first, second

    def _taps(self, which: int) -> tuple[int, ...]:
        """The kernel of the first or second thin convolution."""
        return self.form.split_spatial(self.form.kernel, 1)[which]

    def _places_after(self, places: Sequence[int], thin: dict[str, Any], which: int) -> list[int]:
        """The size of what a thin convolution gives."""
        found = []
        for axis, (size, taps) in enumerate(zip(places, self._taps(which), strict=True)):
            stride, padding, dilation = (thin[name][axis] for name in ("stride", "padding", "dilation"))
            reach = dilation * (taps - 1) - 2 * padding
            if self.transposed:
                found.append((size - 1) * stride + reach + thin["output_padding"][axis] + 1)
            else:
                found.append((size - reach - 1) // stride + 1)
        return found
