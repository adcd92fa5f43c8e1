r"""Orthogonal convolutions: the exponential of a skew-symmetric convolution (SOC, arXiv:2105.11417).

With `T(R)` the filter whose zero-padded convolution is the transpose of R's, `K = (R - T(R)) / 2` gives a Jacobian J
that is skew-symmetric, and :math:`\exp J = \sum_i J^i / i!` an orthogonal one: a few convolutions of the same filter,
each divided by its number. How few is a matter of :math:`\|J\|`, which four norms of K's unfoldings bound.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "EPS", "FILTER_AXES", "Vectors", "convolution_exponential", "four_norms", "power_iteration", "skew_filter",
    "space_to_depth", "start_vectors",
]  # fmt: skip

# The axes of a filter (out, in, height, width) that the right vector of each unfolding spans; the left one has the
# others. Reference: Singla and Feizi 2021, "Fantastic four", arXiv:1911.10258.
FILTER_AXES = ((1, 3), (1, 2), (1, 2, 3), (0, 2, 3))
EPS = 1e-12  # least length, and least norm, that anything is divided by


class Vectors(NamedTuple):
    """The leading singular vectors of the four unfoldings, `right` and `left`, shaped to multiply a filter."""

    right: tuple[Tensor, ...]
    left: tuple[Tensor, ...]


def skew_filter(filters: Tensor) -> Tensor:
    """The part of a filter `(n, n, kh, kw)`, sides odd, whose zero-padded convolution is skew-symmetric.

    >>> skew_filter(torch.tensor([[[[1.0, 2.0, 5.0]]]])).tolist()
    [[[[-2.0, 0.0, 2.0]]]]
    """
    return (filters - filters.transpose(0, 1).flip(2, 3)) / 2


def start_vectors(shape: tuple[int, ...], generator: torch.Generator | None = None) -> Vectors:
    """Random vectors of length 1, in float32 on the CPU, for filters of a shape."""

    def start(axes: tuple[int, ...], own: bool) -> Tensor:
        sizes = [size if (axis in axes) is own else 1 for axis, size in enumerate(shape)]
        return _unit(torch.randn(prod(sizes), generator=generator, device="cpu")).reshape(sizes)

    return Vectors(*(tuple(start(axes, own) for axes in FILTER_AXES) for own in (True, False)))


@torch.no_grad()
def power_iteration(filters: Tensor, vectors: Vectors, iterations: int) -> Vectors:
    """Bring vectors nearer to the leading ones of a filter's unfoldings.

    Cost: 8 passes over the filter an iteration.
    """
    right, left = list(vectors.right), list(vectors.left)
    for index, axes in enumerate(FILTER_AXES):
        others = tuple(axis for axis in range(4) if axis not in axes)
        for _ in range(iterations):
            left[index] = _unit((filters * right[index]).sum(axes, keepdim=True))
            right[index] = _unit((filters * left[index]).sum(others, keepdim=True))
    return Vectors(tuple(right), tuple(left))


def four_norms(filters: Tensor, vectors: Vectors) -> Tensor:
    r"""The spectral norms `(4,)` that vectors give of a filter's unfoldings; differentiable, vectors are constants.

    :math:`\|J\| \le \sqrt{k_h k_w} \min_i s_i` once the vectors have converged.
    """
    pairs = zip(vectors.right, vectors.left, strict=True)
    return torch.stack([(filters * right * left).sum() for right, left in pairs])


def convolution_exponential(inputs: Tensor, filters: Tensor, terms: int) -> Tensor:
    r"""Apply the exponential of a zero-padded convolution, :math:`\sum_{i \le terms} J^i x / i!`.

    Args:
        inputs: `(batch, n, h, w)`.
        filters: `(n, n, kh, kw)`, sides odd.
        terms: convolutions to run; what is cut off is at most :math:`\|J\|^{t+1} / (t + 1)!`.

    >>> convolution_exponential(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 3, 3), 5).item()
    1.0
    """
    padding = (filters.shape[2] // 2, filters.shape[3] // 2)
    total = term = inputs
    for index in range(1, terms + 1):
        term = F.conv2d(term, filters, padding=padding) / index
        total = total + term
    return total


def space_to_depth(inputs: Tensor, stride: int) -> Tensor:
    """Turn every block of places into channels, `(b, c, h, w)` to `(b, c s^2, h / s, w / s)`, zeros where it ends.

    >>> space_to_depth(torch.arange(3.0).reshape(1, 1, 1, 3), 2).flatten().tolist()
    [0.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    """
    height, width = inputs.shape[-2:]
    return F.pixel_unshuffle(F.pad(inputs, (0, -width % stride, 0, -height % stride)), stride)


def _unit(vector: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(vector)
    return vector / length.clamp_min(EPS)
