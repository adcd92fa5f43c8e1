r"""The other form of a reflected layer: `W D = W + B A`, `A = U^T`, `B = W U M`, without ever forming `W D`.

It costs two products with the weight, and saves the product that a layer whose input needs no gradient would do only
for the vectors' sake; for convolutions it is the only form. The weight is multiplied, never copied or cast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .reflecting import Form, added, autocast_off, directions, gram_gradient, inner_factor, lengths_for, to_autocast

__all__ = ["low_rank_factors", "reflected_output"]


def low_rank_factors(
    multiply: Callable[[Tensor], Tensor], vectors: Tensor, *, form: Form, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The LoRA that a chain of reflections is, for a weight that is given by what it does to columns.

    Args:
        multiply: `(width, r) -> (out, r)`, the product with the weight.
        vectors: `U (width, r)`.
        form: as for `reflect`.
        start: as for `reflect`.

    Returns:
        `B (out, r)` and `A (r, width)` in at least float32, differentiable in the vectors; `W D = W + B A`.

    Cost: that of `multiply`, and `O((out + width) r^2)`.

    >>> B, A = low_rank_factors(lambda columns: torch.eye(2) @ columns, torch.tensor([[3.0], [0.0]]), form=Form())
    >>> (torch.eye(2) + B @ A).tolist()
    [[-1.0, 0.0], [0.0, 1.0]]
    """
    with autocast_off(vectors):
        lengths = lengths_for(torch.float16, vectors, form.eps)  # in whatever type the factors will be used
        columns = directions(vectors, start, lengths)
        factor = inner_factor(columns, form, columns.shape[1] - vectors.shape[1], lengths)
        product = multiply(columns).to(columns.dtype)
        return product @ (factor.T if form.transpose else factor), columns.T


def reflected_output(
    output: Tensor, x: Tensor, weight: Tensor, vectors: Tensor, *, form: Form, start: Tensor | None = None
) -> Tensor:
    """Add to a linear layer's output what reflecting its weight changes; for an input that needs no gradient.

    Args:
        output: `(..., out)`, the base's own.
        x: `(..., in)`; gets no gradient.
        weight: `(out, in)`, perhaps a transposed view; gets no gradient.
        vectors: `U (in, r)`.
        form: as for `reflect`.
        start: as for `reflect`.

    Returns:
        `(..., out)`, a new tensor in the type of `output`; differentiable in `output` and `vectors`, once.

    Cost: `2 r (T in + T out + out in)` forward, about twice that backward; keeps `T (in + r) + out r` numbers.
    """
    x = to_autocast(x)
    with autocast_off(x):
        result: Tensor = _ReflectedOutput.apply(output, x, weight, vectors, start, form)  # type: ignore[no-untyped-call]
    return result


class _ReflectedOutput(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, weight: Tensor, vectors: Tensor, start: Tensor | None, form: Form
    ) -> Tensor:
        lengths = lengths_for(x.dtype, vectors, form.eps)
        columns = directions(vectors, start, lengths)
        factor = inner_factor(columns, form, columns.shape[1] - vectors.shape[1], lengths)
        acting = factor.T if form.transpose else factor
        up = (weight @ columns.to(weight.dtype)).to(columns.dtype) @ acting
        inner = x.reshape(-1, x.shape[-1]) @ columns.to(x.dtype)
        ctx.form = form
        ctx.save_for_backward(x, weight, vectors, start, inner, lengths, factor, up)
        return added(output, inner.to(output.dtype), up.to(output.dtype).T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, Tensor | None, None, None]:
        with autocast_off(grad):
            return grad, None, None, _vectors_gradient(ctx, grad) if ctx.needs_input_grad[3] else None, None, None


def _vectors_gradient(ctx: Any, grad: Tensor) -> Tensor:
    x, weight, vectors, start, inner, lengths, factor, up = ctx.saved_tensors
    form: Form = ctx.form
    columns = directions(vectors, start, lengths)
    frozen = columns.shape[1] - vectors.shape[1]
    acting = factor.T if form.transpose else factor
    rows = grad.reshape(-1, grad.shape[-1])
    grad_up = (rows.T @ inner.to(rows.dtype)).to(columns.dtype) @ acting.T
    core = up.T @ grad_up
    outer = (x.reshape(-1, x.shape[-1]).T @ (rows @ up.to(rows.dtype)).to(x.dtype)).to(columns.dtype)
    outer += weight.T @ grad_up.to(weight.dtype)
    outer.addmm_(columns, gram_gradient(core.T if form.transpose else core, form, frozen))
    outer = outer[:, frozen:]
    gradient: Tensor = (outer if lengths is None else outer / lengths).to(vectors.dtype)
    return gradient
