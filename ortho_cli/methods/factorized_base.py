"""What every layer by matrix factors is: `U`, `VT`, perhaps a square `M` between them, perhaps a bias.

The factors are those of the layer's matrix (`linalg/matricize.py`), the groups of a convolution stacked.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ortho_cli.errors import TargetError
from ortho_cli.linalg.frobenius import decay_gradients
from ortho_cli.linalg.matricize import Matricization
from ortho_cli.linalg.product import squared_norm

from .factored_module import FactoredModule

__all__ = ["FactorizedLayer", "matricization"]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Whose hooks are no loss: fully_shard's and the tracker's are set anew on what takes a layer's place.
RENEWED = ("torch.distributed.", "ortho_cli.methods.track_conditioning")

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def matricization(layer: nn.Module, row_axes: int | None = None) -> Matricization:
    """How a layer's weight is a matrix.

    Args:
        layer: any module.
        row_axes: of a convolution's kernel, as `Matricization` takes them.

    Raises:
        TargetError: it has none, or does more with its input than a product; with the reason.

    >>> matricization(nn.Conv2d(4, 6, 3)).matrix_shape
    (18, 12)
    """
    kind = type(layer).__name__
    weight = layer._parameters.get("weight")
    if weight is None or not weight.is_floating_point():
        raise TargetError(f"a {kind}, which multiplies by no plain weight of its own")
    extra = _extra(layer)
    if extra is not None:
        raise TargetError(f"a {kind} with {extra}, which its factors would not have")
    shape = tuple(weight.shape)
    for bases, name in (((nn.Linear,), "linear"), (CONVOLUTIONS, "conv"), (TRANSPOSED, "transposed")):
        base = next((base for base in bases if isinstance(layer, base)), None)
        if base is not None and type(layer).forward is base.forward:
            return Matricization(name, shape, getattr(layer, "groups", 1), row_axes if name != "linear" else None)
    if isinstance(layer, nn.Embedding):
        if layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse:
            raise TargetError(f"a {kind} with max_norm, scale_grad_by_freq or sparse, which its factors cannot have")
        return Matricization("embedding", shape)
    if kind == "Conv1D" and hasattr(layer, "nf"):  # of transformers: a Linear, stored as (in, out)
        return Matricization("conv1d", shape)
    raise TargetError(f"a {kind}, which is neither linear, convolution nor embedding")


def _extra(layer: nn.Module) -> str | None:
    """What a layer does that its class and its parameters do not tell, if so."""
    if "forward" in layer.__dict__:
        return "a forward of its own"
    if layer._parameters.get("bias") is None and getattr(layer, "bias", None) is not None:
        return "a bias that is computed"  # pruned, parametrised
    hooks = (hook for kind in HOOKS for hook in layer.__dict__[kind].values())
    foreign = [hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith(RENEWED)]
    return f"a hook ({getattr(foreign[0], '__qualname__', type(foreign[0]).__name__)})" if foreign else None


class FactorizedLayer(FactoredModule):
    """What all layers by matrix factors are.

    Attributes:
        form: how the weight is a matrix.
        U: `(groups rows, rank)`.
        VT: `(groups rank, cols)`.
        M: `(groups rank, rank)`, or None.
        bias: of the layer, or None.
    """

    U: nn.Parameter
    VT: nn.Parameter
    M: nn.Parameter | None

    def __init__(self, base: nn.Module, rank: int, *, square: bool = False, row_axes: int | None = None) -> None:
        super().__init__(base)
        if rank < 1:
            raise ValueError(f"a rank is at least 1, found {rank}")
        self.form = matricization(base, row_axes)
        self.rank = rank
        weight, groups = base._parameters["weight"], self.form.groups
        assert weight is not None
        self.U = nn.Parameter(weight.new_zeros(groups * self.form.rows, rank), requires_grad=weight.requires_grad)
        self.VT = nn.Parameter(weight.new_zeros(groups * rank, self.form.cols), requires_grad=weight.requires_grad)
        middle = torch.eye(rank, dtype=weight.dtype, device=weight.device).repeat(groups, 1) if square else None
        self.M = None if middle is None else nn.Parameter(middle, requires_grad=weight.requires_grad)

    def factor_parameters(self) -> list[nn.Parameter]:
        """`U`, `VT`, and `M` where there is one."""
        return [self.U, self.VT] if self.M is None else [self.U, self.VT, self.M]

    def scaled_parameters(self) -> list[nn.Parameter]:
        """`U` and `VT`."""
        return [self.U, self.VT]

    def factors(self) -> tuple[Tensor, ...]:
        """`(U, VT)` or `(U, VT, M)`, for a grouped convolution each with a leading dimension of groups; views."""
        return self.unstack(*self.factor_parameters())

    def unstack(self, u: Tensor, vt: Tensor, mid: Tensor | None = None) -> tuple[Tensor, ...]:
        """Tensors of the factors' shapes as `factors` gives them."""
        groups = self.form.groups
        middle = () if mid is None else (mid if groups == 1 else mid.view(groups, self.rank, self.rank),)
        return (*self.form.unstack(u, vt), *middle)

    def squared_norm(self, *parts: Tensor) -> Tensor:
        """`||U M VT||_F^2`, over all groups."""
        return squared_norm(*self.unstack(*parts)).sum()

    def decay_gradients(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """The gradient of half the squared norm, for `U`, `VT` and perhaps `M`, as they are stored."""
        gradients = decay_gradients(*self.unstack(*parts))
        return tuple(gradient.reshape(part.shape) for gradient, part in zip(gradients, parts, strict=True))

    @property
    def weight(self) -> Tensor:
        """The dense weight, multiplied out anew; differentiable."""
        u, vt = self.form.unstack(*self.pair())
        return self.form.to_weight(u @ vt)

    def pair(self) -> tuple[Tensor, Tensor]:
        """Two factors of the weight as they are stored, `M` taken into the one with the shorter side."""
        if self.M is None:
            return self.U, self.VT
        u, vt, mid = self.factors()
        return self.form.stack(*((u @ mid, vt) if self.form.rows <= self.form.cols else (u, mid @ vt)))

    def extra_repr(self) -> str:
        """The layer's shape, its rank and its parts."""
        square = ", square" if self.M is not None else ""
        return f"{self.form.kind} {self.form.shape}, rank={self.rank}{square}, bias={self.bias is not None}"
