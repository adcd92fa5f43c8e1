r"""The optimal learning rate (OLR): the step along a gradient that keeps a weight's length nearest to one.

With `w` and `l` the weight and its gradient as vectors, minimise :math:`\|(w - \eta l)(w - \eta l)^\top - I\|_F^2` to
first order in :math:`\eta`, for `w w` well above 1:

.. math:: \eta^* = \frac{(w w)(l w)}{(w w)(l l) + 2 (l w)^2}

It moves with the scale of the weight and against that of the gradient, is 1/3 where both agree, and is never above
:math:`\|w\| / (2 \sqrt 2 \|l\|)`. Only the weight's length is controlled, not its singular values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ortho_cli.errors import TargetError

__all__ = ["accepted_rate", "olr"]


@torch.no_grad()
def olr(weight: Tensor, grad: Tensor) -> Tensor:
    """Compute the learning rate that best keeps a weight's length while it follows a gradient.

    Negative where the gradient points away from the weight; :func:`accepted_rate` says what a step makes of it.

    Args:
        weight: any shape, type and strides.
        grad: of the same shape; the nearest orthogonal one where that is what the optimizer follows.

    Returns:
        0-dimensional, float64, on the weight's device; NaN where weight or gradient is zero.

    Raises:
        TargetError: different shapes.

    Cost: three dot products, in float64.
    Reference: arXiv:2207.02119, section 4, in the form of its code.

    >>> import ortho_cli as ortho
    >>> _ = torch.manual_seed(0)
    >>> layer, images = torch.nn.Linear(8, 4, bias=False), torch.randn(32, 8)
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    >>> for _ in range(3):
    ...     loss = layer(images).square().mean()
    ...     optimizer.zero_grad(); loss.backward()
    ...     rate = float(ortho.olr(layer.weight, layer.weight.grad))
    ...     optimizer.param_groups[0]["lr"] = rate if 0 < rate < 0.1 else 0.1
    ...     optimizer.step()
    >>> round(float(ortho.olr(layer.weight, layer.weight)), 6)
    0.333333
    """
    if weight.shape != grad.shape:
        raise TargetError(f"a weight of shape {tuple(weight.shape)} has no gradient of shape {tuple(grad.shape)}")
    w, g = weight.double(), grad.double()
    ww, gw, gg = (w * w).sum(), (g * w).sum(), (g * g).sum()
    return ww * gw / (ww * gg + 2 * gw.square())


def accepted_rate(optimal: float, base: float, floor: float = 0.0) -> tuple[float, bool]:
    """The rate of one step: the optimal one where it is positive and below the base, else the base.

    Args:
        optimal: of :func:`olr`; NaN is never taken.
        base: the rate that the other weights have.
        floor: the least share of it.

    Returns:
        The rate, and whether it is the optimal one (raised to the floor where there is one).

    >>> accepted_rate(0.02, 0.1), accepted_rate(-0.02, 0.1), accepted_rate(1e-6, 0.1, floor=0.01)
    ((0.02, True), (0.1, False), (0.001, True))
    """
    accepted = 0 < optimal < base
    return (max(optimal, floor * base), True) if accepted else (base, False)
