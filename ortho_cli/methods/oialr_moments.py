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

__all__ = ["MOMENTS", "Projection", "carry_moments", "image_for", "project"]

MOMENTS = ("rotate", "zero")
# State of torch's optimizers and ours that is an average of gradients, or of squares of gradients or steps. The mean
# that a centred RMSprop subtracts is none of it: the images of both do not leave a variance that is positive.
AVERAGES = frozenset({"exp_avg", "momentum_buffer"})
SQUARES = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta"})

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


def image_for(new: Tensor, value: Tensor, image: Projection, *, squared: bool = False) -> Tensor:
    """The image of what belongs to a parameter, in its own dtype, of the new one's shape and sharded as that is."""
    found = image(whole(value), squared)
    return as_sharded(found.reshape(new.shape).to(value.dtype).contiguous(), new)


@torch.no_grad()
def carry_moments(
    optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, image: Projection, moments: str = "rotate"
) -> None:
    """Let an optimizer train one parameter in the other's place, in the same group.

    Args:
        optimizer: any that makes a parameter's state when it first meets it; its groups and its state are changed in
            place. State with anything in it that has no image (Adamax's maximum, Adafactor's rows and columns, Rprop's
            step sizes, 8-bit codes) begins anew as a whole: parts of it would not fit the rest.
        old: that it holds.
        new: that it will hold.
        image: (whole moment of `old`, whether it is one of squares) -> moment of `new`.
        moments: "rotate", or "zero" to begin anew, the step counter included.
    """
    for group in optimizer.param_groups:
        group["params"][:] = [new if each is old else each for each in group["params"]]
    state = optimizer.state.pop(old, {})
    averages = {key: value for key, value in state.items() if _is_average(key, value, old)}
    counters = {key: value for key, value in state.items() if _is_counter(value)}
    if moments == "zero" or not state or len(averages) + len(counters) < len(state):
        return
    images = {key: image_for(new, value, image, squared=key in SQUARES) for key, value in averages.items()}
    optimizer.state[new] = {**counters, **images}


def _is_average(key: str, value: object, of: Tensor) -> bool:
    return key in AVERAGES | SQUARES and isinstance(value, Tensor) and value.shape == of.shape


def _is_counter(value: object) -> bool:
    return value is None or isinstance(value, (int, float)) or (isinstance(value, Tensor) and not value.dim())
