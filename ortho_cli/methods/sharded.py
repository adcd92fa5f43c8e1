"""Closed-form gradients for parameters that may be sharded: every process computes the whole and keeps its part."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["accumulate", "as_sharded"]


def as_sharded(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same on every process, sharded as another is; of a plain one itself."""
    if not hasattr(like, "full_tensor"):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(like, DTensor)
    whole = DTensor.from_local(value, like.device_mesh, [Replicate()] * like.device_mesh.ndim)
    return whole.redistribute(placements=like.placements)


@torch.no_grad()
def accumulate(parameter: Tensor, gradient: Tensor) -> None:
    """Add a whole gradient, the same on every process, to `.grad` in the parameter's type.

    >>> weight = torch.zeros(2, requires_grad=True)
    >>> accumulate(weight, torch.ones(2)); accumulate(weight, torch.ones(2))
    >>> weight.grad.tolist()
    [2.0, 2.0]
    """
    gradient = as_sharded(gradient, parameter)
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype, copy=True)
    else:
        parameter.grad.add_(gradient)
