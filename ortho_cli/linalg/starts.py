"""First values for new HRA adapters, and padding that changes nothing.

Plain HRA starts from equal pairs (H H = I, so the model is unchanged at step 0); the Gram-Schmidt variant from an
orthonormal basis, since pairs are dependent.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from ortho_cli.errors import TargetError

__all__ = ["orthonormal_start", "pad_pairs", "paired_start", "soft_start"]


def paired_start(
    in_features: int, rank: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    r"""Draw reflection vectors in equal pairs: a chain that is the identity, ready to train.

    PEFT's law, number for number: `kaiming_uniform_(a=sqrt(5))` on an `(in, r/2)` tensor of float32 on the CPU, whose
    fan-in is its second dimension, so entries are uniform in :math:`\pm 1/\sqrt{r/2}`; then each column twice.

    Args:
        in_features: width of the side that turns (a conv: `in * kh * kw`).
        rank: even, at most `in_features`.
        generator: of the CPU; torch's global one by default, so that a seed gives PEFT's numbers.
        dtype: of the result; the draw is always float32, so that it does not depend on it.

    Returns:
        `(in_features, rank)` on the CPU.

    Raises:
        TargetError: an odd rank (its determinant is -1, so it can never start as the identity), or one above the width.

    Reference: HRA, arXiv:2405.17484, section 3.2; PEFT `HRALayer.reset_hra_parameters`.

    >>> u = paired_start(4, 2, torch.Generator().manual_seed(0))
    >>> torch.equal(u[:, 0], u[:, 1]), bool(u.abs().max() <= 1)
    (True, True)
    """
    _check_rank(in_features, rank)
    if rank % 2:
        raise TargetError(
            f"rank {rank} is odd: a chain of {rank} reflections has determinant -1 and cannot start as the identity",
            hint=f"take rank {rank + 1} (or {rank - 1})" if rank > 1 else "take rank 2",
        )
    half = torch.zeros(in_features, rank // 2)
    torch.nn.init.kaiming_uniform_(half, a=sqrt(5), generator=generator)
    return half.repeat_interleave(2, dim=1).to(dtype)


def orthonormal_start(
    in_features: int, rank: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Draw a uniformly random orthonormal basis of `rank` directions, the start of the Gram-Schmidt variant.

    Args:
        in_features: width of the side that turns.
        rank: at most `in_features`; any parity.
        generator: of the CPU; torch's global one by default.
        dtype: of the result; drawn and orthonormalised in float64.

    Returns:
        `(in_features, rank)` on the CPU, `Q^T Q = I`.

    Raises:
        TargetError: rank above the width.

    >>> q = orthonormal_start(5, 3, torch.Generator().manual_seed(0))
    >>> torch.allclose(q.T @ q, torch.eye(3), atol=1e-6)
    True
    """
    _check_rank(in_features, rank)
    basis, upper = torch.linalg.qr(torch.randn(in_features, rank, generator=generator, dtype=torch.float64))
    # A positive diagonal makes the factorisation unique, hence the basis uniform and the same on every LAPACK.
    start: Tensor = (basis * upper.diagonal().sign()).to(dtype)
    return start


def soft_start(
    width: int, rank: int, eps: float, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    r"""Draw the columns that HRA's LLaMA experiments start from: so short that their soft reflections hardly turn.

    `kaiming_uniform_(a=1/eps)` on a `(width, r)` tensor: entries are uniform in
    :math:`\pm\sqrt{6 / (r (1 + \epsilon^{-2}))}`, about 8.7e-5 for 8 columns and `eps` 1e-4. Not the identity: at
    4,096 rows :math:`\|D - I\|_F` is 0.52, and `D` shrinks its directions by a fifth.

    Args:
        width: of the side that turns.
        rank: columns, of any parity.
        eps: of the soft form, above 0.
        generator: of the CPU; torch's global one by default.
        dtype: of the result; the draw is always float32.

    Returns:
        `(width, rank)` on the CPU.

    Raises:
        TargetError: rank above the width.

    >>> u = soft_start(4096, 8, 1e-4, torch.Generator().manual_seed(0))
    >>> f"{u.abs().max().item():.2e} {u[:, 0].square().sum().item():.1e}"
    '8.66e-05 1.0e-05'
    """
    _check_rank(width, rank)
    start = torch.empty(width, rank)
    torch.nn.init.kaiming_uniform_(start, a=1 / eps, generator=generator)
    return start.to(dtype)


def pad_pairs(vectors: Tensor, rank: int) -> Tensor:
    """Lengthen a chain to `rank` reflections without changing its product: equal pairs cancel (H H = I).

    PEFT has one rank for all layers of an HRA adapter; layers with fewer reflections are padded with this. The pairs
    repeat the last column, a direction that is known to be finite and not zero.

    Args:
        vectors: `(d, r)`.
        rank: `r` plus an even number, at most `d`.

    Returns:
        `(d, rank)`, the given columns first.

    Raises:
        TargetError: `rank` is above the width.
        ValueError: `rank` is below `r` or differs from it by an odd number.

    >>> pad_pairs(torch.tensor([[1.0], [2.0], [3.0]]), 3).tolist()
    [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [3.0, 3.0, 3.0]]
    """
    width, found = vectors.shape
    if rank < found or (rank - found) % 2:
        raise ValueError(f"{found} reflections cannot be padded by pairs to {rank}")
    _check_rank(width, rank)
    return torch.cat([vectors, vectors[:, -1:].expand(width, rank - found)], dim=1)


def _check_rank(width: int, rank: int) -> None:
    if not 1 <= rank <= width:
        raise TargetError(
            f"rank {rank} on a layer of width {width}, expected 1 to {width}",
            hint="lower the rank for this layer: --rank PATTERN=N, or leave it out of --targets",
        )
