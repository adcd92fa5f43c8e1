r"""HRA on one layer: `W D` or `D^T W` in effect, with the weight only ever multiplied.

Which form a call takes (DESIGN 4): activations are reflected before (input side) or behind (output side) the frozen
layer; convolutions, and inputs that need no gradient, take the low-rank form. All give the same numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ortho_cli.errors import TargetError
from ortho_cli.linalg.householder import Householder
from ortho_cli.linalg.reflections import normalize, orthonormalize

from .adapter_layer import AdapterLayer, base_of, beside, convolve, is_sharded, whole
from .partial_turn import PartialTurn
from .reflected_weight import low_rank_factors, reflected_output
from .reflecting import Form, reflect

__all__ = ["HRALayer", "parameter_name"]

# Below this many rows for a reflection, two products with the weight cost more than the base's backward.
LEAST_ROWS = 2


def parameter_name(side: str, span: bool, eps: float) -> str:
    """What the vectors are called in a state dict: `hra_u` where they alone say what they do, else a name of its own.

    A reader that knows `hra_u` only must not take vectors of another form for it.

    >>> parameter_name("input", False, 0.0), parameter_name("output", True, 0.0)
    ('hra_u', 'hra_span_output')
    """
    return f"hra_{'span' if span else 'soft' if eps else 'u'}{'_output' if side == 'output' else ''}"


class HRALayer(AdapterLayer):
    r"""A layer whose weight is turned by reflections.

    Plain: `D` is the product of the columns' reflections. `span` (Gram-Schmidt): :math:`D = I - 2 Q Q^\top` for the
    span of the columns, behind :math:`I - 2 Q_0 Q_0^\top` of a frozen `start`, where there is one.

    Args:
        base: the layer; its parameters are left as they are, freezing them is the caller's.
        vectors: `(width, r)`, on the output side `(out, r)`; kept in at least float32, on the base's device.
        side: "input" or "output".
        span: the Gram-Schmidt variant.
        start: its frozen start, orthonormal, `(width, s)`.
        eps: the soft form.

    Raises:
        TargetError: a layer, side or rank that cannot be.
        NumericsError: a zero or non-finite column; dependent ones in the Gram-Schmidt variant.

    Cost: a LoRA's of the same rank, in time and in what is kept for backward.
    Reference: HRA, arXiv:2405.17484.
    """

    def __init__(
        self,
        base: nn.Module,
        vectors: Tensor,
        *,
        side: str = "input",
        span: bool = False,
        start: Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        super().__init__(base)
        if side not in ("input", "output"):
            raise ValueError(f"side is 'input' or 'output', found {side!r}")
        if (eps and span) or (start is not None and not span):
            raise ValueError("eps belongs to a plain chain, a frozen start to the Gram-Schmidt variant")
        shape = self.geometry
        width = shape.width if side == "input" else shape.out
        if vectors.shape[0] != width:
            raise TargetError(
                f"reflection vectors of length {vectors.shape[0]} on a layer whose {side} side is {width} wide",
                hint="the adapter was made for another layer, or for the other side of this one",
            )
        if side == "output" and shape.groups > 1:
            raise TargetError(
                "a grouped convolution, whose outputs see different inputs: turning them gives no such convolution",
                hint="use side: input, or leave the layer out",
            )
        if not vectors.is_meta:
            _ = orthonormalize(vectors.detach()) if span else normalize(vectors.detach(), eps)
        self.side, self.form = side, Form(span, eps)
        self.name = parameter_name(side, span, eps)
        self.register_parameter(self.name, nn.Parameter(beside(base, vectors)))
        self.register_buffer("hra_start", None if start is None else beside(base, start).to(self.vectors.dtype))
        self._part = PartialTurn()
        if eps:
            self.register_buffer("hra_eps", torch.tensor(eps, dtype=torch.float64, device=self.vectors.device))

    @property
    def vectors(self) -> nn.Parameter:
        """The trained columns, `(width, r)`."""
        found: nn.Parameter = getattr(self, self.name)
        return found

    @property
    def start(self) -> Tensor | None:
        """The frozen start of the Gram-Schmidt variant."""
        found: Tensor | None = self.hra_start
        return found

    @property
    def rank(self) -> int:
        """Trained columns."""
        return self.vectors.shape[1]

    def extra_repr(self) -> str:
        """What the adapter is, for `print(model)`."""
        kind = "gram_schmidt, " if self.form.span else f"eps={self.form.eps:g}, " if self.form.eps else ""
        return f"HRA rank={self.rank}, {kind}side={self.side}"

    def chain(self) -> Tensor:
        """Columns whose plain product of reflections is this adapter's `D`: for Gram-Schmidt `[Q0 | Q]`."""
        vectors = whole(self.vectors).detach()
        if not self.form.span:
            return vectors
        basis = orthonormalize(vectors)
        return basis if self.start is None else torch.cat([orthonormalize(whole(self.start)), basis], dim=1)

    def operator(self) -> Householder:
        """The chain of reflections, on the side it turns."""
        return Householder(self.chain(), side=self.side, eps=self.form.eps)

    def times(self, columns: Tensor) -> Tensor:
        """`W D` or `D^T W` times columns."""
        if not self.acts():
            return self.base_times(columns)
        if self.side == "input":
            return self.base_times(self._reflected(columns.T).T)
        return self._reflected(self.base_times(columns).T, transpose=True).T

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The adapted layer; further arguments are the frozen layer's."""
        if not self.acts():
            found: Tensor = self.fixed_linear(x, *args, **kwargs)
            return found
        if self.side == "output":
            return self._turn_output(self.fixed_linear(x, *args, **kwargs))
        if self.geometry.kind == "conv":
            up, down = self._low_rank()
            output: Tensor = self.fixed_linear(x, *args, **kwargs)
            return output + convolve(self, x, down, up).to(output.dtype)
        if self._wants_low_rank(x):
            output = self.fixed_linear(x, *args, **kwargs)
            return reflected_output(output, x, self.matrix(), self.vectors, form=self.form, start=self.start)
        turned: Tensor = self.fixed_linear(self._reflected(x), *args, **kwargs)
        return turned

    def _low_rank(self) -> tuple[Tensor, Tensor]:
        if self.strength != 1:
            return self._part.of(self).low_rank(self.base_times)
        return low_rank_factors(self.base_times, self.vectors, form=self.form, start=self.start)

    def _reflected(self, x: Tensor, transpose: bool = False) -> Tensor:
        if self.strength != 1:
            return self._part.of(self).turn(x, transpose=transpose)
        form = Form(self.form.span, self.form.eps, transpose=True) if transpose else self.form
        return reflect(x, self.vectors, form=form, start=self.start)

    def _wants_low_rank(self, x: Tensor) -> bool:
        """Whether backward through the base would be done for the vectors' sake only."""
        return (
            torch.is_grad_enabled()
            and self.strength == 1
            and not x.requires_grad
            and self.vectors.requires_grad
            and self.geometry.kind != "opaque"
            and not is_sharded(self.weight)  # here, outside of the frozen layer's own forward: left to it alone
            and not isinstance(self.fixed_linear, AdapterLayer)
            and x.numel() > LEAST_ROWS * self.rank * x.shape[-1]
        )

    def _turn_output(self, output: Tensor) -> Tensor:
        """`(y - b) D + b`, as one reflection of the output and a shift of the size of the bias."""
        channels = 1 - self.weight.dim() if self.geometry.kind == "conv" else -1
        turned = self._reflected(output if channels == -1 else output.movedim(channels, -1), transpose=True)
        bias: Tensor | None = getattr(base_of(self), "bias", None)
        if bias is not None:
            bias = whole(bias)
            shift = bias - self._reflected(bias, transpose=True)
            turned = turned + shift.to(turned.dtype)
        return turned if channels == -1 else turned.movedim(-1, channels)
