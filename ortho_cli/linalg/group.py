r"""Group orthogonality (GOR): small sets of filters pulled towards orthonormal ones, as a penalty with its gradient.

A weight is a matrix of rows, one filter each (`filter_rows`). Its rows are dealt into small matrices `T_b (r, d)`, and

    penalty = sum_b ||T_b T_b^T - I||_F^2,     gradient = 4 (T_b T_b^T - I) T_b.

`inter`: T_b is one group of consecutive filters (a channel group of GroupNorm); `intra`: the b-th filter of every
group; one group is soft orthogonality of the whole layer. The gradient costs what one more product costs, so it is
written out rather than left to autograd, for many layers at once. Which layers: `methods/gor.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ortho_cli.linalg.precision import at_least_float32

__all__ = ["MODES", "bucket_penalty", "buckets", "count_groups", "filter_rows", "group_penalty", "rows_to_weight"]

MODES = ("inter", "intra")
# Layers are stacked until a bucket holds this many numbers: on a CPU half a megabyte, which stays in the cache (ResNet-
# 110 runs twice as fast as with one stack per shape); elsewhere launches are what costs, and this bounds the memory.
CPU_BUCKET, DEVICE_BUCKET = 2**17, 2**24
# Scale-free form: a group whose mean squared length is below this has no shape to speak of.
NO_SHAPE = 1e-30


def count_groups(filters: int, groups: int = 32, min_filters: int = 4) -> tuple[int, int]:
    r"""Into how many groups the filters of a layer go: :math:`N = \min(groups, \lfloor filters / min \rfloor)`.

    Where `N` does not divide the number of filters, the largest divisor below it is taken, so that all groups are
    alike and none has fewer than `min_filters`.

    Args:
        filters: rows of the weight.
        groups: the most groups.
        min_filters: the fewest filters a group may have.

    Returns:
        `(count, wanted)`: what is used and what the formula asks for; `(0, 0)` for a layer too small for one group.

    Reference: GOR, arXiv:2306.10001; its code stops where the numbers do not divide.

    >>> count_groups(64), count_groups(200), count_groups(3)
    ((16, 16), (25, 32), (0, 0))
    """
    if groups < 1 or min_filters < 1:
        raise ValueError(f"groups and min_filters are at least 1, found {groups} and {min_filters}")
    wanted = min(groups, filters // min_filters)
    return next((count for count in range(wanted, 0, -1) if filters % count == 0), 0), wanted


def filter_rows(weight: Tensor, transposed: int = 0) -> Tensor:
    """See a weight as a matrix with one filter, the weights of one output channel, in each row.

    Args:
        weight: `(out, in)` of a Linear, `(out, in / groups, *kernel)` of a convolution; with `transposed`
            `(in, out / groups, *kernel)` of a transposed one, or `(in, out)` of a transformers Conv1D.
        transposed: 0, or the `groups` of the transposed convolution (1 for a Conv1D).

    Returns:
        `(out, d)`, a view where strides allow; differentiable.

    >>> filter_rows(torch.zeros(6, 4, 3, 3)).shape, filter_rows(torch.zeros(6, 4, 3, 3), transposed=2).shape
    (torch.Size([6, 36]), torch.Size([8, 27]))
    """
    if not transposed:
        return weight.reshape(weight.shape[0], -1)
    # Output channel o = (group, position) has weights from the input channels of its group only.
    blocks = weight.reshape(transposed, weight.shape[0] // transposed, weight.shape[1], -1)
    return blocks.transpose(1, 2).reshape(transposed * weight.shape[1], -1)


def rows_to_weight(rows: Tensor, shape: Sequence[int], transposed: int = 0) -> Tensor:
    """Undo :func:`filter_rows`.

    >>> weight = torch.arange(24.0).view(4, 3, 2)
    >>> torch.equal(rows_to_weight(filter_rows(weight, 2), weight.shape, 2), weight)
    True
    """
    if not transposed:
        return rows.reshape(tuple(shape))
    blocks = rows.reshape(transposed, shape[1], shape[0] // transposed, -1)
    return blocks.transpose(1, 2).reshape(tuple(shape))


def buckets(layers: Sequence[tuple[int, int, int, torch.dtype, torch.device]]) -> list[list[int]]:
    """Sort layers into lists that one batched product serves: all alike, and bounded in size.

    Args:
        layers: of each its rows, columns, groups, type and device.

    Returns:
        Indices into `layers`; each stands in exactly one bucket, a layer above the bound in one of its own.

    >>> alike = (torch.float32, torch.device("cpu"))
    >>> buckets([(4, 9, 1, *alike), (8, 9, 2, *alike), (4, 9, 1, *alike)])
    [[0, 2], [1]]
    """
    found: list[list[int]] = []
    alike: dict[tuple[int, int, int, torch.dtype, torch.device], list[int]] = {}
    for index, layer in enumerate(layers):
        alike.setdefault(layer, []).append(index)
    for (rows, columns, _, _, device), members in alike.items():
        room = max(1, (CPU_BUCKET if device.type == "cpu" else DEVICE_BUCKET) // max(1, rows * columns))
        found += [members[start : start + room] for start in range(0, len(members), room)]
    return found


def bucket_penalty(
    rows: Sequence[Tensor], count: int, mode: str = "inter", *, normalize: bool = False, scale: float | None = 1.0
) -> tuple[Tensor, list[Tensor]]:
    r"""Compute the penalty of layers of one shape, and its gradient in closed form.

    Of `T^T T` (tall) and `T T^T` (wide) the smaller is formed: the gradient is the same, the value differs by the
    constant `d - r` and is zero exactly for orthonormal rows (wide) or columns (tall). `G - I` is formed as such: the
    expanded :math:`\|G\|^2 - 2 tr G + k` loses four digits near the optimum.

    With `normalize` each Gram is divided by its mean diagonal, :math:`\|k G / tr\,G - I\|_F^2`: the same zeros up to
    the length of `T`, but blind to it, so that it neither fights weight decay nor blows up a LoRA that starts near
    zero. Its gradient grows as `1 / |T|`; a group of zeros has value `k` and gradient 0, as without.

    Args:
        rows: matrices `(c, d)` of one shape, type and device; half types are computed in float32.
        count: groups in each; divides `c`.
        mode: "inter" or "intra".
        normalize: the scale-free form.
        scale: factor of the gradients; None to leave them out.

    Returns:
        The sum over layers and groups, 0-dimensional, in at least float32; and each layer's gradient `(c, d)` times
        `scale`, same type. Not differentiable: see :func:`group_penalty`.

    Cost: `2 min(r, d) c d` multiply-adds a layer, half of that without gradients.
    Reference: GOR, arXiv:2306.10001, eq. (2).

    >>> value, (gradient,) = bucket_penalty([torch.diag(torch.tensor([1.0, 2.0]))], 1)
    >>> value.item(), gradient.tolist()
    (9.0, [[0.0, 0.0], [0.0, 24.0]])
    """
    with torch.no_grad(), _in_full(rows[0]):
        stacked = _stack(rows, count, mode)
        value, factor = _value_and_factor(stacked, normalize)
        return value, [] if scale is None else _gradients(stacked, factor, scale, mode)


def group_penalty(
    rows: Sequence[Tensor], counts: Sequence[int], mode: str = "inter", *, normalize: bool = False
) -> Tensor:
    """The penalty of any number of layers as one differentiable number, in someone's own loop.

    Args:
        rows: matrices `(c, d)` of :func:`filter_rows`, any shapes and float types.
        counts: groups in each; divides its `c`.
        mode: "inter" or "intra".
        normalize: the scale-free form of :func:`bucket_penalty`.

    Returns:
        0-dimensional, in at least float32; differentiable, also twice.

    Cost: as :func:`bucket_penalty`; from forward to backward only Grams are held.

    >>> weight = torch.ones(4, 2, requires_grad=True)
    >>> group_penalty([weight], [2]).backward()
    >>> weight.grad.unique().tolist()
    [12.0]
    """
    if not rows:
        raise ValueError("no weights given")
    penalty: Tensor = _GroupPenalty.apply(tuple(counts), mode, normalize, *rows)  # type: ignore[no-untyped-call]
    return penalty


class _GroupPenalty(torch.autograd.Function):
    """Keeps the small factors `4 (G - I)` of forward; backward reads the weights once more.

    Backward is made of differentiable steps, and forms the factors anew where it is itself to be differentiated.
    """

    @staticmethod
    def forward(ctx: Any, counts: tuple[int, ...], mode: str, normalize: bool, *rows: Tensor) -> Tensor:
        layers = [
            (*matrix.shape, count, matrix.dtype, matrix.device) for matrix, count in zip(rows, counts, strict=True)
        ]
        ctx.buckets, ctx.counts, ctx.mode, ctx.normalize = buckets(layers), counts, mode, normalize
        total, factors = None, []
        for members in ctx.buckets:
            with _in_full(rows[members[0]]):
                stacked = _stack([rows[index] for index in members], counts[members[0]], mode)
                value, factor = _value_and_factor(stacked, normalize)
            total = value if total is None else total + value.to(total.device)
            factors.append(factor)
        ctx.save_for_backward(*factors, *rows)
        assert total is not None
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        factors, rows = ctx.saved_tensors[: len(ctx.buckets)], ctx.saved_tensors[len(ctx.buckets) :]
        gradients: list[Tensor | None] = [None] * len(rows)
        for members, factor in zip(ctx.buckets, factors, strict=True):
            with _in_full(factor):
                stacked = _stack([rows[index] for index in members], ctx.counts[members[0]], ctx.mode)
                if torch.is_grad_enabled():  # create_graph=True
                    _, factor = _value_and_factor(stacked, ctx.normalize)
                found = _gradients(stacked, factor, upstream.to(factor), ctx.mode)
            for index, gradient in zip(members, found, strict=True):
                gradients[index] = gradient.to(rows[index].dtype) if ctx.needs_input_grad[index + 3] else None
        return None, None, None, *gradients


def _in_full(tensor: Tensor) -> AbstractContextManager[Any]:
    """No autocast: in half precision G - I is noise."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _stack(rows: Sequence[Tensor], count: int, mode: str) -> Tensor:
    """Layers as matrices `(layers, b, r, d)`."""
    dealt = [_deal(matrix, count, mode) for matrix in rows]
    return at_least_float32(torch.stack(dealt) if len(dealt) > 1 else dealt[0][None], "weight")


def _value_and_factor(stacked: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """The penalty of the matrices `T`, and the small `F` with which its gradient is `F T` (wide) or `T F` (tall)."""
    matrices = stacked.flatten(0, 1)
    _, r, d = matrices.shape
    k = min(r, d)
    left, right = (matrices.mT, matrices) if r >= d else (matrices, matrices.mT)
    eye = torch.eye(k, dtype=matrices.dtype, device=matrices.device)
    if not normalize:
        excess = torch.baddbmm(eye, left, right, beta=-1)
        return excess.square().sum(), 4 * excess
    gram = torch.bmm(left, right)
    square_length = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    shrink = 1 / torch.where(square_length > NO_SHAPE, square_length, torch.inf)
    excess = shrink * gram - eye
    squares = excess.square().sum((1, 2), keepdim=True)
    # The mean diagonal moves with T too; the trace of `excess` is zero, which leaves this one term.
    return squares.sum(), 4 * shrink * (excess - squares / k * eye)


def _gradients(stacked: Tensor, factor: Tensor, scale: float | Tensor, mode: str) -> list[Tensor]:
    matrices = stacked.flatten(0, 1)
    factor = factor * scale
    tall = matrices.shape[1] >= matrices.shape[2]
    gradient = torch.bmm(matrices, factor) if tall else torch.bmm(factor, matrices)
    return [_collect(part, mode) for part in gradient.view(stacked.shape).unbind()]


def _deal(rows: Tensor, count: int, mode: str) -> Tensor:
    """Rows into matrices `(b, r, d)`: groups of consecutive rows, or the b-th row of every group."""
    if mode not in MODES:
        raise ValueError(f"mode is 'inter' or 'intra', found {mode!r}")
    if rows.dim() != 2 or count < 1 or rows.shape[0] % count:
        raise ValueError(f"a matrix of shape {tuple(rows.shape)} does not go into {count} groups of rows")
    groups = rows.reshape(count, rows.shape[0] // count, rows.shape[1])
    return groups.transpose(0, 1) if mode == "intra" else groups


def _collect(matrices: Tensor, mode: str) -> Tensor:
    """Undo :func:`_deal`."""
    return (matrices.transpose(0, 1) if mode == "intra" else matrices).flatten(0, 1)
