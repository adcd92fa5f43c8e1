r"""Frobenius decay: the gradient of :math:`\tfrac12\|U M V^T\|_F^2` for every factor, in closed form.

Weight decay on the factors shrinks the nuclear norm of a layer, that is its rank; this decays the layer's own norm, as
weight decay does for a dense one. No autograd, and no product as long as the small Gram matrices are cheaper.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ortho_cli.linalg.precision import at_least_float32
from ortho_cli.linalg.product import prefers_product

__all__ = ["add_decay_gradients_", "decay_gradients"]

# On an accelerator launches are what costs, so layers of one shape go in one batched call of up to so many entries of
# their factors. On a CPU the copies into a batch cost what they save.
UNBATCHED, BUCKET_ENTRIES = ("cpu",), 2**24


def decay_gradients(u: Tensor, vt: Tensor, mid: Tensor | None = None) -> tuple[Tensor, ...]:
    r"""Differentiate :math:`\tfrac12 \|U M V^T\|_F^2`.

    With two factors `dU = U (VT VT^T)` and `dVT = (U^T U) VT`: their inner products with the factors all equal the
    square norm, and they do not change `U^T U - VT VT^T`. Where the rank is near the sides or above, the product
    itself is the cheaper way, `dU = W VT^T` and `dVT = U^T W`.

    Args:
        u: `(..., m, r)`, any plain float type; half types are computed in float32.
        vt: `(..., r, n)`.
        mid: `(..., r, r)`, where there is a third factor.

    Returns:
        `(dU, dVT)` or `(dU, dVT, dM)`, shaped as the factors, in at least float32.

    Cost: `2 r^2 (m + n)` multiply-adds, with M `5 r^3` more; or `3 m n r`, with M `3 r^2 min(m, n)` more.
    Reference: FNL, arXiv:2105.01029, section 4.

    >>> u, vt = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), torch.tensor([[1.0, 2.0, 0.0], [3.0, 4.0, 1.0]])
    >>> [gradient.tolist() for gradient in decay_gradients(u, vt)]
    [[[5.0, 11.0], [22.0, 52.0], [16.0, 37.0]], [[5.0, 8.0, 1.0], [16.0, 22.0, 5.0]]]
    """
    return tuple(left @ right for left, right in _terms(u, vt, mid))


def add_decay_gradients_(
    factors: Sequence[tuple[Tensor, ...]], gradients: Sequence[tuple[Tensor, ...]], coef: float
) -> None:
    r"""Add :math:`\mathrm{coef}\cdot\nabla\tfrac12\|U M V^T\|^2` of many layers to their gradients, in place.

    Args:
        factors: of each layer `(U, VT)` or `(U, VT, M)`, as in :func:`decay_gradients`.
        gradients: tensors of the same shapes, added to in their own dtype.
        coef: the decay's strength.

    Cost: as :func:`decay_gradients`, without temporaries of the factors' size; on accelerators one batched call a
        shape.

    >>> u, vt, gradient = torch.ones(3, 1), torch.ones(1, 3), torch.zeros(3, 1)
    >>> add_decay_gradients_([(u, vt)], [(gradient, torch.zeros(1, 3))], coef=0.5)
    >>> gradient.mT.tolist()
    [[1.5, 1.5, 1.5]]
    """
    if len(factors) != len(gradients):
        raise ValueError(f"{len(factors)} layers and gradients of {len(gradients)}")
    with torch.no_grad(), _in_full({parts[0].device.type for parts in factors}):
        for members in _buckets(factors):
            if len(members) == 1:
                (index,) = members
                for total, (left, right) in zip(gradients[index], _terms(*factors[index]), strict=True):
                    _add_product_(total, left, right, coef)
                continue
            stacked = (torch.stack(parts) for parts in zip(*(factors[index] for index in members), strict=True))
            for place, (left, right) in enumerate(_terms(*stacked)):
                totals = [gradients[index][place] for index in members]
                torch._foreach_add_(totals, (left @ right).to(totals[0].dtype).unbind(), alpha=coef)


def _terms(u: Tensor, vt: Tensor, mid: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
    """For each factor two matrices whose product is its gradient."""
    u, vt = at_least_float32(u, "U"), at_least_float32(vt, "VT")
    rows, cols, rank = u.shape[-2], vt.shape[-1], u.shape[-1]
    if mid is None:
        if prefers_product(rows, cols, rank):
            product = u @ vt
            return [(product, vt.mT), (u.mT, product)]
        return [(u, vt @ vt.mT), (u.mT @ u, vt)]
    mid = at_least_float32(mid, "M")
    if 2 * rank * (rows + cols) + 5 * rank**2 > 3 * rows * cols + 3 * rank * min(rows, cols):
        if rows > cols:  # M is best multiplied into the shorter side: the same for the transposed product
            of_vt, of_u, of_mid = ((right.mT, left.mT) for left, right in _terms(vt.mT, u.mT, mid.mT))
            return [of_u, of_vt, of_mid]
        left = u @ mid
        product = left @ vt
        inward = product @ vt.mT
        return [(inward, mid.mT), (left.mT, product), (u.mT, inward)]
    gram_u, gram_v = u.mT @ u, vt @ vt.mT
    mid_gram = mid @ gram_v
    return [(u, mid_gram @ mid.mT), (mid.mT @ (gram_u @ mid), vt), (gram_u, mid_gram)]


def _add_product_(total: Tensor, left: Tensor, right: Tensor, coef: float) -> None:
    if total.dtype != left.dtype or total.dim() > 3:
        total.add_((left @ right).to(total.dtype), alpha=coef)
    elif total.dim() == 3:
        total.baddbmm_(left, right, alpha=coef)
    else:
        total.addmm_(left, right, alpha=coef)


def _buckets(factors: Sequence[tuple[Tensor, ...]]) -> Iterator[list[int]]:
    """Indices of layers that are done together."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for index, parts in enumerate(factors):
        if parts[0].device.type in UNBATCHED:
            yield [index]
        else:
            key = (parts[0].device, parts[0].dtype, *(part.shape for part in parts))
            alike.setdefault(key, []).append(index)
    for members in alike.values():
        room = max(1, BUCKET_ENTRIES // sum(part.numel() for part in factors[members[0]]))
        yield from (members[first : first + room] for first in range(0, len(members), room))


@contextmanager
def _in_full(devices: set[str]) -> Iterator[None]:
    """No autocast: squares of small weights vanish in half precision."""
    with ExitStack() as stack:
        for device in devices:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
