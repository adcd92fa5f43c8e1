"""DoRA: an additive adapter whose sum is normalised and given a learned length."""

from __future__ import annotations

import torch
from torch import Tensor

from ortho_cli.errors import NumericsError, TargetError
from ortho_cli.linalg.operator import Operator, Shape, check_block, no_low_rank
from ortho_cli.linalg.precision import adapter_tensor, require_working_dtype

__all__ = ["Dora"]


class Dora:
    r"""Add a delta, normalise, and set the lengths (DoRA): :math:`W' = m \circ (W + \Delta) / \|W + \Delta\|`.

    `axis="output"`: one magnitude per row and row norms (PEFT's `lora_magnitude_vector`, Linear and conv alike; newer
    LyCORIS). `axis="input"`: one magnitude per input channel, norms over everything else (LyCORIS `dora_scale`
    of shape `(1, in, ...)`); the columns of a channel are neighbours in a matricised conv.

    Args:
        delta: what is added, at its full scale: a LoRA, LoHa or LoKr operator.
        magnitude: one number per row or channel, in any shape of that many elements.
        axis: "output" or "input".
        strength: the share of `W' - W` that is added; the tools that have a slider for DoRA scale this difference.

    Raises:
        TargetError: the number of magnitudes does not fit the delta.
        NumericsError: a non-finite value; in `apply`, a zero direction that is to have a length.

    Cost: that of the delta. The norms are lost, so there is no inverse and no low-rank form.
    Reference: DoRA, arXiv:2402.09353, eq. (5); PEFT `tuners/lora/dora.py`; LyCORIS `apply_weight_decompose`.

    >>> from ortho_cli.linalg.lowrank import LowRank
    >>> none = LowRank(torch.zeros(1, 1), torch.zeros(1, 2))
    >>> Dora(none, torch.tensor([10.0])).apply(torch.tensor([[3.0, 4.0]])).tolist()
    [[6.0, 8.0]]
    """

    kind = "dora"
    rank = None

    def __init__(self, delta: Operator, magnitude: Tensor, *, axis: str = "output", strength: float = 1.0) -> None:
        if axis not in ("output", "input"):
            raise ValueError(f"axis is 'output' or 'input', found {axis!r}")
        self.delta = delta
        self.magnitude = adapter_tensor(magnitude, "DoRA magnitude").reshape(-1)
        self.axis = axis
        self.strength = strength
        out, width = delta.shape
        count = self.magnitude.shape[0]
        fits = (out is None or count == out) if axis == "output" else (width is None or width % count == 0)
        if not fits:
            raise TargetError(f"{count} DoRA magnitudes on the {axis} side of a weight of shape ({out}, {width})")
        self.shape: Shape = (count if axis == "output" else out, width)

    @property
    def row_multiple(self) -> int:
        """That of the delta for row norms; column norms need all rows."""
        return self.delta.row_multiple if self.axis == "output" else 0

    def to(self, dtype: torch.dtype) -> Dora:
        """The delta and the magnitudes in `dtype`."""
        require_working_dtype(dtype)
        return Dora(self.delta.to(dtype), self.magnitude.to(dtype), axis=self.axis, strength=self.strength)

    def apply(self, weight: Tensor, first_row: int = 0) -> Tensor:
        """Rows of the normalised, rescaled sum; a zero row of magnitude zero stays zero."""
        check_block(self, weight, first_row)
        whole = self._whole(weight, first_row)
        return whole if self.strength == 1 else torch.lerp(weight, whole, self.strength)

    def _whole(self, weight: Tensor, first_row: int) -> Tensor:
        moved = self.delta.apply(weight, first_row)
        magnitude = self.magnitude.to(weight.dtype)
        if self.axis == "output":
            magnitude = magnitude[first_row : first_row + weight.shape[0], None]
            return moved * _lengths(magnitude, torch.linalg.vector_norm(moved, dim=1, keepdim=True))
        channels = moved.reshape(moved.shape[0], magnitude.shape[0], -1)
        norms = torch.linalg.vector_norm(channels, dim=(0, 2))
        return (channels * _lengths(magnitude, norms)[None, :, None]).reshape(weight.shape)

    def inverse(self) -> Dora:
        """There is none: the norms of the base are not in the adapter.

        Raises:
            TargetError: always.
        """
        raise TargetError(
            "a dora adapter cannot be undone: it replaced the norms of the base",
            hint="keep the base file, or an undo file made when merging",
        )

    def power(self, alpha: float) -> Dora:
        """A share of the difference that DoRA makes."""
        return Dora(self.delta, self.magnitude, axis=self.axis, strength=self.strength * alpha)

    def as_low_rank(self, weight: Tensor, first_row: int = 0) -> tuple[Tensor, Tensor]:
        """There is none: every row is rescaled."""
        raise no_low_rank(self)

    def angles(self) -> None:
        """None: it stretches."""
        return None


def _lengths(magnitude: Tensor, norms: Tensor) -> Tensor:
    """`magnitude / norms`, with 0 / 0 = 0: such rows are zero in the base too (pruned or padded channels)."""
    lost = (norms == 0) & (magnitude != 0)
    if bool(lost.any()):
        raise NumericsError(
            f"{int(lost.sum())} of {norms.numel()} directions of a DoRA weight are zero but are to have a length",
            hint="the adapter does not belong to this base",
        )
    return magnitude / torch.where(norms == 0, 1.0, norms)
