"""How tangled a generator's coordinates are: stochastic estimates over directions of -1 and 1.

With a code's coordinates independent, moving along a random sign vector does the same whatever the signs. The variance
over sign vectors is therefore the off-diagonal part of a Hessian, or of a Jacobian's Gram matrix: twice the sum of its
squares, without ever forming it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Largest", "hessian_penalty", "orthogonal_jacobian_penalty"]

Outputs = Callable[[Tensor], list[Tensor]]
"""A code ``(B, n)`` to tensors ``(B, ...)``: what a generator makes, layer by layer."""

Largest = Callable[[Tensor], Tensor]
"""The largest values here, one for each output, to the largest anywhere: of samples that are shared out."""


def _here(values: Tensor) -> Tensor:
    return values


def hessian_penalty(
    function: Outputs, code: Tensor, signs: Tensor, step: float = 0.1, largest: Largest = _here
) -> Tensor:
    """The variance of second differences over sign vectors: the largest over all entries, summed over outputs.

    Args:
        function: to be regularised.
        code: ``(B, n)``.
        signs: ``(k, B, n)`` of -1 and 1, k at least 2.
        step: of the differences.
        largest: agrees with those who have the other samples of a batch.

    Returns:
        A scalar with a graph.

    Cost: ``2 k + 1`` forward passes.
    Reference: Peebles et al. 2020, arXiv:2008.10599, equation 5.

    >>> code, signs = torch.zeros(1, 2), torch.tensor([[[1.0, 1.0]], [[1.0, -1.0]]])
    >>> hessian_penalty(lambda z: [z[:, :1] * z[:, 1:]], code, signs, 1.0).item()  # (2 - -2)^2 / 2
    8.0
    """
    here = function(code)
    second = [
        [(up - 2 * middle + down) / step**2 for up, middle, down in zip(ahead, here, behind, strict=True)]
        for ahead, behind in ((function(code + step * sign), function(code - step * sign)) for sign in signs)
    ]
    return _variance(second, largest)


def orthogonal_jacobian_penalty(
    function: Outputs, code: Tensor, signs: Tensor, step: float = 0.1, largest: Largest = _here
) -> Tensor:
    """The variance over sign vectors of how far an output moves: the largest over samples, summed over outputs.

    Args:
        function: to be regularised.
        code: ``(B, n)``.
        signs: ``(k, B, n)`` of -1 and 1, k at least 2.
        step: of the differences.
        largest: agrees with those who have the other samples of a batch.

    Returns:
        A scalar with a graph; zero where the columns of each output's Jacobian are orthogonal.

    Cost: ``k + 1`` forward passes.
    Reference: Wei et al. 2021, arXiv:2108.07668, equation 6.

    >>> code, signs = torch.zeros(1, 2), torch.tensor([[[1.0, 1.0]], [[1.0, -1.0]]])
    >>> orthogonal_jacobian_penalty(lambda z: [z @ torch.tensor([[1.0, 0.0], [0.0, 5.0]])], code, signs, 1.0).item()
    0.0
    >>> orthogonal_jacobian_penalty(lambda z: [z.sum(1, keepdim=True)], code, signs, 1.0).item()  # lengths 4 and 0
    8.0
    """
    here = function(code)
    lengths = [
        [
            ((ahead - middle) / step).flatten(1).square().sum(1)
            for ahead, middle in zip(function(code + step * sign), here, strict=True)
        ]
        for sign in signs
    ]
    return _variance(lengths, largest)


def _variance(found: list[list[Tensor]], largest: Largest) -> Tensor:
    """Over sign vectors, unbiased; the largest entry of each output, summed over outputs."""
    return largest(torch.stack([torch.stack(each).var(0).amax() for each in zip(*found, strict=True)])).sum()
