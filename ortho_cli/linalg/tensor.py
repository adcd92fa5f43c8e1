"""A weight matrix as a tensor of three dimensions, decomposed into a tensor train or a Tucker form.

The entries of `W (out, in)`, read row by row, are a tensor `(d1, d2, d3)`. A tensor train holds it as `G1 (d1, r1)`,
`G2 (r1, d2, r2)`, `G3 (r2, d3)`; a Tucker form as a core `(r1, r2, r3)` and a factor `(d, r)` for each dimension. What
is computed with them: `tensor_train.py`.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ortho_cli.errors import TargetError
from ortho_cli.linalg.precision import at_least_float32

__all__ = ["TENSOR_KINDS", "fold_dims", "tensor_parameters", "tensor_ranks", "tensor_train", "tucker"]

TENSOR_KINDS = ("tensor-train", "tucker")
Train = tuple[Tensor, Tensor, Tensor]
Tucker = tuple[Tensor, Tensor, Tensor, Tensor]
Dims = tuple[int, int, int]


def fold_dims(entries: int) -> Dims:
    """Choose three dimensions for that many entries: a cube, or twice the least divisor at or above the cube root.

    Reference: FNL, arXiv:2105.01029, and its code.

    >>> fold_dims(64), fold_dims(640 * 640), fold_dims(160 * 16)
    ((4, 4, 4), (80, 80, 64), (16, 16, 10))
    """
    if entries < 1:
        raise ValueError(f"a weight of {entries} entries has no dimensions")
    root = round(entries ** (1 / 3))
    found, rest = [], entries
    for _ in range(2):
        divisor = next((d for d in range(root, rest + 1) if rest % d == 0), rest)
        found.append(divisor)
        rest //= divisor
    return found[0], found[1], rest


def tensor_ranks(kind: str, dims: Dims, scale: float) -> tuple[int, ...]:
    """Round a share of the dimensions to ranks: two of a train, three of a Tucker form, each at least 1.

    Reference: FNL, arXiv:2105.01029, and its code.

    >>> tensor_ranks("tensor-train", (80, 80, 64), 0.234), tensor_ranks("tucker", (80, 80, 64), 0.211)
    ((19, 15), (17, 17, 14))
    """
    _check_kind(kind)
    if kind == "tensor-train":
        widest = _widest(dims)
        ends = min(dims[0], dims[1]), min(dims[1], dims[2])
        return tuple(min(max(1, round(scale * end)), limit) for end, limit in zip(ends, widest, strict=True))
    ranks = [min(max(1, round(scale * d)), d) for d in dims]
    return tuple(min(rank, prod(ranks) // rank) for rank in ranks)  # no unfolded core is wider than it is long


def tensor_parameters(kind: str, dims: Dims, ranks: tuple[int, ...], compat: str | None = None) -> int:
    """Count what a tensor form stores.

    Args:
        kind: "tensor-train" or "tucker".
        dims: of :func:`fold_dims`.
        ranks: of :func:`tensor_ranks`.
        compat: "tntorch" counts a Tucker core as that library stores it, as three cores of a train of full rank.

    >>> tensor_parameters("tensor-train", (80, 80, 64), (19, 15))
    25280
    """
    _check_kind(kind)
    if compat not in (None, "tntorch"):
        raise ValueError(f"compat {compat!r} is not 'tntorch'")
    if kind == "tensor-train":
        return dims[0] * ranks[0] + ranks[0] * dims[1] * ranks[1] + ranks[1] * dims[2]
    factors = sum(d * r for d, r in zip(dims, ranks, strict=True))
    if compat is None:
        return factors + prod(ranks)
    bond = min(dims[0], ranks[1] * ranks[2])
    return factors + ranks[0] * bond + bond * ranks[1] * ranks[2] + ranks[2] ** 2


def tensor_train(weight: Tensor, dims: Dims, ranks: tuple[int, ...]) -> Train:
    """Decompose a weight into a tensor train, by two singular value decompositions.

    Args:
        weight: any shape with the entries of `dims`, read row by row; half types are computed in float32.
        dims: of :func:`fold_dims`.
        ranks: `(r1, r2)`.

    Returns:
        `G1 (d1, r1)`, `G2 (r1, d2, r2)`, `G3 (r2, d3)`; the first two with orthonormal columns.

    Reference: Oseledets 2011 (TT-SVD).

    >>> [tuple(core.shape) for core in tensor_train(torch.ones(4, 2), (2, 2, 2), (1, 2))]
    [(2, 1), (1, 2, 2), (2, 2)]
    """
    first, second = (min(rank, limit) for rank, limit in zip(ranks, _widest(dims), strict=True))
    rest = at_least_float32(weight, "weight").reshape(dims[0], -1)
    head, values, tail = torch.linalg.svd(rest, full_matrices=False)
    rest = (values[:first, None] * tail[:first]).reshape(first * dims[1], dims[2])
    middle, values, tail = torch.linalg.svd(rest, full_matrices=False)
    second = min(second, len(values))
    return head[:, :first], middle[:, :second].reshape(first, dims[1], second), values[:second, None] * tail[:second]


def tucker(weight: Tensor, dims: Dims, ranks: tuple[int, ...]) -> Tucker:
    """Decompose a weight into a Tucker form, one dimension after the other.

    Args:
        weight: as in :func:`tensor_train`.
        dims: of :func:`fold_dims`.
        ranks: `(r1, r2, r3)`, none above the product of the others.

    Returns:
        The core `(r1, r2, r3)` and the factors `(d, r)` of the three dimensions, with orthonormal columns.

    Reference: Vannieuwenhoven, Vandebril and Meerbergen 2012 (sequentially truncated HOSVD).

    >>> [tuple(part.shape) for part in tucker(torch.ones(4, 2), (2, 2, 2), (2, 1, 2))]
    [(2, 1, 2), (2, 2), (2, 1), (2, 2)]
    """
    core = at_least_float32(weight, "weight").reshape(dims)
    factors = []
    for axis, rank in enumerate(ranks):
        unfolded = core.movedim(axis, 0).flatten(1)
        factor = torch.linalg.svd(unfolded, full_matrices=False).U[:, :rank]
        core = torch.movedim(torch.tensordot(factor, core, dims=([0], [axis])), 0, axis)
        factors.append(factor)
    return core, factors[0], factors[1], factors[2]


def _widest(dims: Dims) -> tuple[int, int]:
    """The largest ranks a train of these dimensions can need."""
    return min(dims[0], dims[1] * dims[2]), min(dims[2], dims[0] * dims[1])


def _check_kind(kind: str) -> None:
    if kind not in TENSOR_KINDS:
        raise TargetError(f"tensor form {kind!r} is none of {', '.join(TENSOR_KINDS)}")
