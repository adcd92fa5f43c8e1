r"""What an optimizer knows of a weight, said of its core: moments follow the basis.

With :math:`W = U \Sigma V^T` and U, V fixed, gradients of the core are :math:`U^T G V`. So are their averages, exactly.
Averages of squares have no exact image; of entries that vary independently it is :math:`(U^{\circ 2})^T E[G^{\circ 2}]
V^{\circ 2}`, which stays positive and on the scale that the step counter's bias correction expects.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .adapter_layer import whole
from .sharded import as_sharded

__all__ = ["MOMENTS", "Projection", "carry_moments", "project"]

MOMENTS = ("rotate", "zero")
# State of torch's optimizers and ours that is an average of gradients, or of their squares; the rest of a weight's
# shape (Adamax's maximum, for one) has no image and starts anew.
AVERAGES = frozenset({"exp_avg", "momentum_buffer", "grad_avg"})
SQUARES = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"})

Projection = Callable[[Tensor, bool], Tensor]


def project(left: Tensor, matrix: Tensor, right: Tensor, *, squared: bool = False) -> Tensor:
    """`left^T matrix right^T`, or with the squares of both sides' entries.

    Args:
        left: `(..., m, r)`.
        matrix: `(..., m, n)`.
        right: `(..., r, n)`.
        squared: for averages of squares.

    >>> turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    >>> round(project(turn, torch.eye(2), turn.T, squared=True).sum().item(), 4)
    2.0
    """
    if squared:
        left, right = left.square(), right.square()
    return left.mT @ matrix.to(left.dtype) @ right.mT


@torch.no_grad()
def carry_moments(
    optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, image: Projection, moments: str = "rotate"
) -> None:
    """Let an optimizer train one parameter in the other's place, in the same group.

    Args:
        optimizer: any; its groups and its state are changed in place.
        old: that it holds.
        new: that it will hold.
        image: (whole moment of `old`, whether it is one of squares) -> moment of `new`.
        moments: "rotate", or "zero" to begin anew, the step counter included.
    """
    for group in optimizer.param_groups:
        group["params"][:] = [new if each is old else each for each in group["params"]]
    state = optimizer.state.pop(old, {})
    if moments == "zero" or not state:
        return
    carried = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.shape != old.shape:
            carried[key] = value
        elif key in AVERAGES | SQUARES:
            moment = image(whole(value), key in SQUARES)
            carried[key] = as_sharded(moment.reshape(new.shape).to(value.dtype).contiguous(), new)
        else:
            carried[key] = as_sharded(whole(value).new_zeros(new.shape), new)
    optimizer.state[new] = carried
