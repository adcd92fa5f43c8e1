r"""Which leading directions of a changed weight are new: close to no singular vector of the weight that it was.

Full fine-tuning bends the leading directions of a weight; a low-rank adapter can put directions of its own among them,
"intruder dimensions". For each leading singular vector `x` of `W'` the best :math:`|\cos|` with any singular vector of
`W` says which it is.

A large `W` need not be decomposed for that. A few Lanczos steps from `x` with :math:`W^T W` give the spectral measure
of `x`, the mass :math:`\cos^2` that it has at each singular value, and the largest mass is what is asked for. It is an
upper bound that the steps sharpen: neighbours in the spectrum which they cannot part count as one direction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ortho_cli.errors import check_choice
from ortho_cli.linalg.precision import at_least_float32
from ortho_cli.linalg.subspace_iteration import gram, leading_subspace

__all__ = ["METHODS", "Closeness", "closest_directions"]

METHODS = ("auto", "exact", "lanczos")
# Up to this side the eigenvectors of the Gram matrix cost about what forming it costs.
EXACT_SIDE = 1536
# Directions of W with less than this share of its largest value are none: float32 products blur their long vectors, and
# the null space of a rank-deficient W has no vectors of its own that something could be close to.
NULL = 1e-5
# Lanczos steps. Eigenvalues closer to 0 than about (pi / 2 STEPS)^2 of the largest look like one to them, on which any
# new direction has most of its mass: directions of W this faint (7 % of its largest singular value) do not count.
STEPS = 48
FAINT = 3.4 / STEPS
# A random subspace resolves its first vectors best: it is made this many times wider.
SPARE = 4
# Next to the largest squared singular value, a step of this length leads nowhere: the vector is spent.
SPENT = 1e-5


class Closeness(NamedTuple):
    """For each leading component of `W'`, the best `|cos|` of its two vectors with those of `W`: `(k,)`, float64.

    `output` is of the left singular vectors, `input` of the right ones; `method` is what gave them.
    """

    output: Tensor
    input: Tensor
    method: str


def closest_directions(before: Tensor, after: Tensor, count: int = 10, *, method: str = "auto") -> Closeness:
    r"""Compare the leading singular vectors of a weight with all those that it had.

    Args:
        before: `W (m, n)`, any plain float type.
        after: `W' (m, n)`.
        count: leading components of `W'`; there are at most as many as its rank.
        method: "exact"; "lanczos", a sharp upper bound; "auto" is that beyond a side of `EXACT_SIDE`.

    Returns:
        Values in [0, 1]: 1 where nothing changed. An input-side rotation keeps the left vectors, an output-side one the
        right ones.

    Cost: exact, two Gram matrices of the shorter side and their eigenvectors, in float64; by Lanczos, about fifty
        products with each weight and a few vectors for each component.
    Reference: Shuttleworth et al., arXiv:2410.21228; Golub and Meurant, Matrices, Moments and Quadrature, 2010.

    >>> before, new = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.tensor([[1.0, 1.0, 1.0]])
    >>> found = closest_directions(before, before + 10 * new.T @ new, count=1)
    >>> round(found.output.item(), 1), round(found.input.item(), 1)
    (0.6, 0.6)
    """
    check_choice("method", method, METHODS)
    tall = before.shape[0] >= before.shape[1]
    old, new = (side if tall else side.mT for side in (at_least_float32(before), at_least_float32(after)))
    if method == "auto":
        method = "exact" if old.shape[1] <= EXACT_SIDE else "lanczos"
    long, short = _exact(old, new, count) if method == "exact" else _lanczos(old, new, count)
    output, entering = (long, short) if tall else (short, long)
    return Closeness(output, entering, method)


def _exact(old: Tensor, new: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The best cosines of the long and of the short vectors, from both whole decompositions."""
    basis, values = _eigenvectors(old)
    leading, own = _eigenvectors(new, count)
    long = (new @ leading.to(new.dtype)).double() / own
    old_long = (basis.mT @ (old.mT @ long.to(old.dtype)).double()) / values[:, None]
    found = [
        each.abs().amax(0).clamp(max=1.0)
        if len(each)
        else each.new_zeros(each.shape[1])  # W of zeros: nothing is close
        for each in (old_long, basis.mT @ leading)
    ]
    return found[0], found[1]


def _eigenvectors(side: Tensor, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Right singular vectors `(n, k)` of a tall matrix and their values, descending, in float64; without the null."""
    squares, vectors = torch.linalg.eigh(gram(side, torch.float64))
    values = squares.clamp_min(0).sqrt().flip(-1)
    kept = int((values > NULL * values[0]).sum())
    kept = kept if count is None else min(kept, count)
    return vectors.flip(-1)[:, :kept], values[:kept]


def _lanczos(old: Tensor, new: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The same for the leading vectors of a random subspace, from their spectral measures."""
    leading, product = leading_subspace(new, min(SPARE * count, new.shape[1]))
    own = torch.linalg.vector_norm(product, dim=0)
    kept = min(count, int((own > NULL * own[0]).sum()))
    leading, long = leading[:, :kept], product[:, :kept] / own[:kept]
    return (
        _largest_mass(lambda block: old @ (old.mT @ block), long).sqrt(),
        _largest_mass(lambda block: old.mT @ (old @ block), leading).sqrt(),
    )


def _largest_mass(apply: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """The largest weight at one eigenvalue in the spectral measure of each unit column, by Gauss quadrature.

    The nodes of as many steps and of one less lie between each other, so that one of both is near any eigenvalue.
    """
    k, steps = start.shape[1], min(STEPS, start.shape[0])
    matrix = torch.zeros(k, steps, steps, dtype=torch.float64, device=start.device)
    basis = start.new_zeros(steps, *start.shape)
    vector = start
    for step in range(steps):
        basis[step] = vector
        image = apply(vector)
        matrix[:, step, step] = (vector * image).sum(0).double()
        for _ in range(2):  # orthogonal to all before: once leaves rounding that later steps amplify
            image = image - torch.einsum("snk,sk->nk", basis, torch.einsum("snk,nk->sk", basis, image))
        length = torch.linalg.vector_norm(image, dim=0)
        length = torch.where(length > SPENT * matrix.diagonal(dim1=1, dim2=2).amax(1), length, 0.0)
        vector = image / torch.where(length > 0, length, 1.0) * (length > 0)
        if step + 1 < steps:
            matrix[:, step, step + 1] = matrix[:, step + 1, step] = length.double()
    found = matrix.new_zeros(k)
    least = FAINT if steps < start.shape[0] else NULL  # after as many steps as there are dimensions nothing is hidden
    for size in {max(1, steps - 1), steps}:
        nodes, vectors = torch.linalg.eigh(matrix[:, :size, :size])
        weights = vectors[:, 0].square() * (nodes > least**2 * nodes.amax(1, keepdim=True))
        found = torch.maximum(found, weights.amax(1))
    return found.clamp(max=1.0)
