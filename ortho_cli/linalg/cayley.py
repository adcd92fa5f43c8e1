r"""From stored OFT parameters to rotation blocks `(n, b, b)`: the Cayley transform and its dialects.

PEFT stores the upper triangle of a skew `Q` and uses `R = (I - Q)(I + Q)^-1` or a truncated Neumann series of the
*opposite* sign; kohya and LyCORIS store a square `B`, take `Q = B - B^T` and `R = (I + Q)(I - Q)^-1`. All of it runs
and returns in float64 (the blocks are small); the operator rounds once.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from ortho_cli.errors import TargetError
from ortho_cli.linalg.precision import adapter_tensor

__all__ = ["cayley", "cayley_neumann", "diag_oft", "limit_skew", "skew_from_upper", "skew_part"]


def skew_from_upper(upper: Tensor, block: int) -> Tensor:
    """Unfold PEFT's `oft_R.weight` into skew-symmetric blocks, row by row of the upper triangle.

    Args:
        upper: `(n, b (b - 1) / 2)`, any float type.
        block: `b`.

    Returns:
        `Q (n, b, b)`, float64, `Q^T = -Q`.

    Raises:
        TargetError: the rows are not of length `b (b - 1) / 2`.
        NumericsError: a non-finite value.

    >>> skew_from_upper(torch.tensor([[1.0, 2.0, 3.0]]), 3)[0].tolist()
    [[0.0, 1.0, 2.0], [-1.0, 0.0, 3.0], [-2.0, -3.0, 0.0]]
    """
    if upper.dim() != 2 or upper.shape[1] != block * (block - 1) // 2:
        raise TargetError(
            f"OFT parameters of shape {tuple(upper.shape)} for blocks of {block}, "
            f"expected (blocks, {block * (block - 1) // 2})",
            hint="r or oft_block_size in adapter_config.json do not belong to these tensors",
        )
    values = adapter_tensor(upper, "OFT parameters").to(torch.float64)
    skew = torch.zeros(upper.shape[0], block, block, dtype=torch.float64, device=upper.device)
    rows, columns = torch.triu_indices(block, block, offset=1, device=upper.device)
    skew[:, rows, columns] = values
    return skew - skew.mT


def skew_part(blocks: Tensor) -> Tensor:
    """Take `B - B^T` of square blocks: the `Q` of kohya and LyCORIS; PEFT's BOFT uses half of it.

    Args:
        blocks: `(n, b, b)`, any float type.

    Returns:
        `(n, b, b)`, float64.

    Raises:
        TargetError: the blocks are not square.
        NumericsError: a non-finite value.

    >>> skew_part(torch.tensor([[[5.0, 1.0], [0.0, 5.0]]]))[0].tolist()
    [[0.0, 1.0], [-1.0, 0.0]]
    """
    if blocks.dim() != 3 or blocks.shape[1] != blocks.shape[2]:
        raise TargetError(f"rotation blocks of shape {tuple(blocks.shape)}, expected (blocks, b, b)")
    values = adapter_tensor(blocks, "rotation blocks").to(torch.float64)
    return values - values.mT


def cayley(skew: Tensor) -> Tensor:
    r"""Map skew-symmetric blocks to rotations, :math:`R = (I - Q)(I + Q)^{-1}`: PEFT's exact form.

    Orthogonal of determinant +1, never with an eigenvalue -1; `cayley(-Q)` is the transpose.

    Args:
        skew: `Q (n, b, b)`.

    Returns:
        `R (n, b, b)`, float64.

    Cost: `O(n b^3)`.
    Use instead: :func:`cayley_neumann` where the adapter was trained with `use_cayley_neumann`.
    Reference: OFT, arXiv:2306.07280; PEFT `OFTRotationModule._cayley_batch`.

    >>> r = cayley(skew_from_upper(torch.tensor([[1.0]]), 2))     # a quarter turn
    >>> r[0].tolist()
    [[0.0, -1.0], [1.0, 0.0]]
    """
    skew = skew.to(torch.float64)
    eye = torch.eye(skew.shape[-1], dtype=torch.float64, device=skew.device)
    rotation: Tensor = torch.linalg.solve(eye + skew, eye - skew, left=False)
    return rotation


def cayley_neumann(skew: Tensor, terms: int = 5) -> Tensor:
    r"""Evaluate PEFT's truncated Cayley series, :math:`I + 2Q + 2Q^2 + \dots + 2Q^{k-2} + Q^{k-1}` for `k` terms.

    PEFT's default. It approximates :math:`(I + Q)(I - Q)^{-1}`: the inverse of what :func:`cayley` gives for
    the same `Q`, so the flag of training decides. Only nearly orthogonal, the defect is about :math:`2 \|Q\|^k`.

    Args:
        skew: `Q (n, b, b)`.
        terms: `num_cayley_neumann_terms`. As in PEFT, 1 is the identity, 2 is `I + 2Q`, and 3 equals 4.

    Returns:
        `(n, b, b)`, float64.

    Cost: `O(terms n b^3)`.
    Reference: OFTv2, arXiv:2506.19847; PEFT `OFTRotationModule._cayley_batch`.

    >>> cayley_neumann(skew_from_upper(torch.tensor([[0.125]]), 2), terms=2)[0].tolist()
    [[1.0, 0.25], [-0.25, 1.0]]
    """
    if terms < 1:
        raise ValueError(f"at least one term, found {terms}")
    skew = skew.to(torch.float64)
    total = torch.eye(skew.shape[-1], dtype=torch.float64, device=skew.device).expand_as(skew).clone()
    if terms == 2:
        return total + 2 * skew
    if terms > 2:
        last = max(terms - 1, 3)  # PEFT's loop always adds a closing power, so three terms already reach the cube
        power = skew
        for _ in range(1, last):
            total += 2 * power
            power = power @ skew
        total += power
    return total


def limit_skew(skew: Tensor, limit: float, *, each: bool) -> Tensor:
    r"""Shrink skew blocks whose Frobenius norm is above `limit`, as constrained OFT does before the Cayley map.

    Args:
        skew: `Q (n, b, b)`.
        limit: PEFT's COFT: `eps`, shared out as :math:`\epsilon / \sqrt n` to each of the `n` stored blocks;
            kohya and LyCORIS: `alpha * out`, on all blocks together.
        each: PEFT's way (True) or kohya's (False).

    Returns:
        `(n, b, b)`, float64; unchanged where the limit holds.

    Reference: COFT in arXiv:2306.07280; PEFT `OFTRotationModule._project_batch`; kohya `OFTModule.get_weight`.

    >>> limit_skew(skew_from_upper(torch.tensor([[3.0]]), 2), 2.0**0.5, each=True)[0].tolist()
    [[0.0, 1.0], [-1.0, 0.0]]
    """
    skew = skew.to(torch.float64)
    if each:
        norms = torch.linalg.matrix_norm(skew, keepdim=True)
        limit = limit / sqrt(skew.shape[0])
    else:
        norms = torch.linalg.vector_norm(skew)
    # A zero norm is within any limit: it divides nothing.
    return skew * torch.where(norms > limit, limit / norms.clamp_min(torch.finfo(torch.float64).tiny), 1.0)


def diag_oft(blocks: Tensor, limit: float | None = None) -> Tensor:
    r"""Turn stored `oft_blocks` of kohya or LyCORIS into rotations, :math:`R = (I + Q)(I - Q)^{-1}`, `Q = B - B^T`.

    Both tools then multiply output rows by `R^T`: `BlockRotation(diag_oft(blocks, limit), side="output")`.

    Args:
        blocks: `B (n, b, b)`, any float type.
        limit: `alpha * out_features`, a bound on the norm of all `Q` together; None for no bound (LyCORIS writes
            `alpha` 0 then; for kohya 0 is a bound, which makes every block the identity).

    Returns:
        `R (n, b, b)`, float64.

    Raises:
        TargetError: the blocks are not square.
        NumericsError: a non-finite value.

    Reference: kohya sd-scripts `networks/oft.py`; LyCORIS `modules/diag_oft.py`.

    >>> diag_oft(torch.tensor([[[0.0, 1.0], [0.0, 0.0]]]))[0].tolist()
    [[0.0, 1.0], [-1.0, 0.0]]
    """
    skew = skew_part(blocks)
    if limit is not None:
        skew = limit_skew(skew, limit, each=False)
    return cayley(-skew)
