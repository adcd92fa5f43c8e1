r"""Reflections of activations as one autograd step: `x D^T` at the cost of a LoRA, saving what a LoRA saves.

`D = I + U M U^T` with `M = -(striu(U^T U) + diag(U^T U) / 2)^-1` for columns `U (d, r)` of any length. Forward is two
products with `d x r` factors, backward four, and a few of size `r`. Saved are the input and its `r` coordinates, as by
LoRA, and `M`. The Gram-Schmidt form is the same with `M = -2 (U^T U)^-1`: no basis is computed.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "PLAIN", "Form", "added", "autocast_off", "directions", "gram_gradient", "inner_factor", "lengths_for", "reflect",
    "to_autocast",
]  # fmt: skip


@dataclass(frozen=True)
class Form:
    """How vectors make the map `D`.

    Attributes:
        span: the Gram-Schmidt variant, `D = I - 2 Q Q^T` with `Q` a basis of the columns' span.
        eps: softens: columns are divided by `sqrt(|u|^2 + eps)`.
        transpose: `D^T` in place of `D`.
    """

    span: bool = False
    eps: float = 0.0
    transpose: bool = False


PLAIN = Form()


def reflect(x: Tensor, vectors: Tensor, *, form: Form = PLAIN, start: Tensor | None = None) -> Tensor:
    r"""Turn layer inputs by an HRA adapter: :math:`x D^\top`, so that `base(reflect(x, U))` has the weight `W D`.

    The same map as :func:`~ortho_cli.linalg.reflections.reflect_activations`, made for training: products of vectors
    are computed in their float32, those with activations in the activations' type (autocast's, where it is on).

    Args:
        x: `(..., d)`, any float type.
        vectors: `U (d, r)`; half types are raised to float32.
        form: plain chain, span, soft, transposed.
        start: `Q0 (d, s)`, orthonormal, only with `form.span`: :math:`D = (I - 2 Q_0 Q_0^\top)(I - 2 Q Q^\top)`.

    Returns:
        `(..., d)` in the type of the product with `x`; NaN where a column is zero.

    Cost: forward `4 T d r` and backward `8 T d r` for `T` rows, a LoRA's; keeps `T (d + r)` numbers. Differentiable
    once, in `x` and `vectors`.
    Reference: HRA, arXiv:2405.17484, eq. (2)-(4).

    >>> reflect(torch.tensor([1.0, 2.0]), torch.tensor([[0.0], [4.0]])).tolist()
    [1.0, -2.0]
    """
    if x.shape[-1] != vectors.shape[0]:
        raise ValueError(f"activations of width {x.shape[-1]}, reflections of width {vectors.shape[0]}")
    x = to_autocast(x)
    with autocast_off(x):
        reflected: Tensor = _Reflect.apply(x, vectors, start, form)  # type: ignore[no-untyped-call]
    return reflected


def to_autocast(x: Tensor) -> Tensor:
    """The tensor in the type autocast would multiply it in, if autocast is on."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) and x.is_floating_point() else x


def autocast_off(x: Tensor) -> AbstractContextManager[Any]:
    """A block in which products on the tensor's device keep the types they are given."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def lengths_for(dtype: torch.dtype, vectors: Tensor, eps: float) -> Tensor | None:
    """What to divide columns by before products in a type: float16 has no room for lengths, others need no division."""
    if dtype != torch.float16:
        return None
    lengths: Tensor = torch.linalg.vector_norm(_wide(vectors), dim=0)
    return (lengths.square() + eps).sqrt() if eps else lengths


def directions(vectors: Tensor, start: Tensor | None, lengths: Tensor | None) -> Tensor:
    """The columns `U`, in at least float32, after those of a frozen start."""
    columns = _wide(vectors)
    if lengths is not None:
        columns = columns / lengths
    return columns if start is None else torch.cat([start.to(columns.dtype), columns], dim=1)


def inner_factor(columns: Tensor, form: Form, frozen: int, lengths: Tensor | None) -> Tensor:
    """`M (r, r)` with `D = I + U M U^T`; `frozen` columns of a start come first."""
    eye = torch.eye(columns.shape[1], dtype=columns.dtype, device=columns.device)
    minus = torch.addmm(eye, columns.T, columns, beta=0, alpha=-1)
    if form.span:
        inverse: Tensor = torch.linalg.inv_ex(_blocks(minus, frozen).double()).inverse
        return inverse.to(columns.dtype)
    diagonal = minus.diagonal()
    if form.eps:
        diagonal.sub_(form.eps if lengths is None else form.eps / lengths.square())
    diagonal.mul_(0.5)  # what is below is not read
    factor: Tensor = torch.linalg.solve_triangular(minus, eye, upper=True)
    return factor


def gram_gradient(grad: Tensor, form: Form, frozen: int) -> Tensor:
    """What the gradient of `M^-1` means for `U`: its product with `U` is to be added; symmetric."""
    if not form.span:
        return grad.triu() + grad.triu(1).T
    part = _blocks(grad, frozen)
    return part + part.T


def _blocks(gram: Tensor, frozen: int) -> Tensor:
    """Of two spans that act one after the other: half of each one's Gram, all of the products above, none below."""
    if not frozen:
        return gram / 2
    part = gram.clone()
    part[:frozen, :frozen] /= 2
    part[frozen:, frozen:] /= 2
    part[frozen:, :frozen] = 0
    return part


def added(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`x + left right`, as a tensor of its own: of a view, a layer that works in place would be refused its input."""
    total = x.clone(memory_format=torch.contiguous_format)
    total.view(-1, x.shape[-1]).addmm_(left, right)
    return total


def _wide(vectors: Tensor) -> Tensor:
    return vectors if vectors.dtype in (torch.float32, torch.float64) else vectors.float()


class _Reflect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, vectors: Tensor, start: Tensor | None, form: Form) -> Tensor:
        lengths = lengths_for(x.dtype, vectors, form.eps)
        columns = directions(vectors, start, lengths)
        factor = inner_factor(columns, form, columns.shape[1] - vectors.shape[1], lengths)
        turned = columns @ (factor.T if form.transpose else factor)
        inner = x.reshape(-1, x.shape[-1]) @ columns.to(x.dtype)
        ctx.form = form
        ctx.save_for_backward(x, vectors, start, inner, lengths, factor)
        return added(x, inner, turned.to(x.dtype).T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        with autocast_off(grad):
            return _reflect_backward(ctx, grad)


def _reflect_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x, vectors, start, inner, lengths, factor = ctx.saved_tensors
    form: Form = ctx.form
    columns = directions(vectors, start, lengths)
    acting = factor.T if form.transpose else factor
    turned = columns @ acting
    rows = grad.reshape(-1, grad.shape[-1])
    back = rows @ turned.to(x.dtype)
    grad_x = grad_vectors = None
    if ctx.needs_input_grad[0]:
        grad_x = added(grad, back, columns.to(x.dtype).T)
    if ctx.needs_input_grad[1]:
        frozen = columns.shape[1] - vectors.shape[1]
        # Products of long factors are taken as (r, d), the faster side of BLAS, and turned by the last sum.
        outer = acting @ (inner.T @ rows).to(columns.dtype)
        core = outer @ turned
        outer += back.T @ x.reshape(-1, x.shape[-1])
        core = gram_gradient(core if form.transpose else core.T, form, frozen)
        full = torch.addmm(outer.T, columns, core)[:, frozen:]
        grad_vectors = (full if lengths is None else full / lengths).to(vectors.dtype)
    return grad_x, grad_vectors, None, None
