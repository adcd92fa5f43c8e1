r"""The products inside attention, head by head: :math:`Q_h^T K_h` that scores and :math:`O_h V_h` that writes.

Only these products act, not their factors: they can be decayed like a layer, and rebalanced without changing what the
layer computes. Where several query heads share one key and value head (grouped queries), their rows are stacked, since
:math:`\sum_a \|Q_a^T K\|^2` is the square norm of the stack.

Limits: rotary positions act between Q and K, so that there the scores are no function of the product. Biases of Q and K
(or V) can be appended to their weights as one more column; the score's scale `1 / sqrt(size)` is left out.
"""

from __future__ import annotations

from torch import Tensor

from ortho_cli.errors import TargetError

__all__ = ["output_value", "output_value_weights", "query_key", "query_key_weights"]


def query_key(query: Tensor, key: Tensor, heads: int, key_heads: int | None = None) -> tuple[Tensor, Tensor]:
    """See the weights of Q and K as one factored product a head, `U_h = Q_h^T`, `VT_h = K_h`.

    Args:
        query: `(heads * size, width)`.
        key: `(key_heads * size, width_of_keys)`; another width for cross-attention.
        heads: query heads.
        key_heads: key heads where there are fewer.

    Returns:
        `U (key_heads, shared * width, size)` and `VT (key_heads, size, width_of_keys)`, `shared = heads / key_heads`;
        views where nothing is shared.

    Raises:
        TargetError: weights that do not go into the heads.

    Reference: FNL, arXiv:2105.01029, section 5.

    >>> import torch
    >>> u, vt = query_key(torch.ones(4, 6), torch.ones(4, 6), heads=2)
    >>> u.shape, vt.shape
    (torch.Size([2, 6, 2]), torch.Size([2, 2, 6]))
    """
    groups, shared, size = _head_sizes(query.shape[0], key.shape[0], heads, key_heads)
    u = query.view(groups, shared, size, query.shape[1]).transpose(2, 3).reshape(groups, -1, size)
    return u, key.view(groups, size, key.shape[1])


def query_key_weights(u: Tensor, vt: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Undo :func:`query_key` (also for a size of head that has become smaller).

    >>> import torch
    >>> q, k = torch.randn(4, 6), torch.randn(2, 5)
    >>> all(map(torch.equal, query_key_weights(*query_key(q, k, 4, 2), heads=4), (q, k)))
    True
    """
    groups, size = vt.shape[:2]
    query = u.reshape(groups, heads // groups, -1, size).transpose(2, 3)
    return query.reshape(heads * size, -1), vt.reshape(groups * size, -1)


def output_value(output: Tensor, value: Tensor, heads: int, value_heads: int | None = None) -> tuple[Tensor, Tensor]:
    """See the weights of the output projection and V as one factored product a head, `U_h = O_h`, `VT_h = V_h`.

    Args:
        output: `(width, heads * size)`.
        value: `(value_heads * size, width_of_values)`.
        heads: query heads.
        value_heads: value heads where there are fewer.

    Returns:
        `U (value_heads, shared * width, size)` and `VT (value_heads, size, width_of_values)`.

    Raises:
        TargetError: weights that do not go into the heads.

    >>> import torch
    >>> u, vt = output_value(torch.ones(6, 4), torch.ones(4, 6), heads=2)
    >>> u.shape, vt.shape
    (torch.Size([2, 6, 2]), torch.Size([2, 2, 6]))
    """
    groups, shared, size = _head_sizes(output.shape[1], value.shape[0], heads, value_heads)
    u = output.view(output.shape[0], groups, shared, size).permute(1, 2, 0, 3).reshape(groups, -1, size)
    return u, value.view(groups, size, value.shape[1])


def output_value_weights(u: Tensor, vt: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Undo :func:`output_value`.

    >>> import torch
    >>> o, v = torch.randn(6, 4), torch.randn(2, 5)
    >>> all(map(torch.equal, output_value_weights(*output_value(o, v, 4, 2), heads=4), (o, v)))
    True
    """
    groups, size = vt.shape[:2]
    output = u.reshape(groups, heads // groups, -1, size).permute(2, 0, 1, 3)
    return output.reshape(output.shape[0], heads * size), vt.reshape(groups * size, -1)


def _head_sizes(many: int, few: int, heads: int, shared_heads: int | None) -> tuple[int, int, int]:
    """Heads on the shared side, query heads for each, and the size of one."""
    groups = shared_heads or heads
    if heads % groups or many % heads or few * heads != many * groups:
        raise TargetError(f"{many} and {few} features do not go into {heads} and {groups} heads of one size")
    return groups, heads // groups, many // heads
