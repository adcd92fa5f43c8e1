r"""Soft orthogonality of one matrix: how far its Gram is from the identity, in the three forms that papers use."""

from __future__ import annotations

import torch
from torch import Tensor

from ortho_cli.errors import check_choice
from ortho_cli.linalg.nog import as_matrix
from ortho_cli.linalg.precision import at_least_float32

__all__ = ["FORMS", "soft_orthogonality"]

FORMS = ("norm", "squared", "mean")


def soft_orthogonality(weight: Tensor, form: str = "norm") -> Tensor:
    r"""Measure how far a weight is from orthonormal rows, or columns where it has more rows, as a penalty.

    Of the matrix `W` with dimension 0 for its rows, :math:`\|W W^\top - I\|_F` or, of a tall one,
    :math:`\|W^\top W - I\|_F`, which can be zero where the other cannot; its square has the same gradient.

    Args:
        weight: two or more dimensions, any plain float type.
        form: "norm", the plain norm (arXiv:2207.02119); "squared"; "mean", the mean square of the Gram's entries
            (the paper's GANs).

    Returns:
        0-dimensional, in at least float32; differentiable, with gradient 0 where it is 0.

    Raises:
        TargetError: fewer than two dimensions, or no plain float.
        UsageError: no such form.

    Cost: `2 m n min(m, n)` flops.

    >>> soft_orthogonality(torch.eye(2, 3)).item(), soft_orthogonality(2 * torch.eye(3, 2), "squared").item()
    (0.0, 18.0)
    """
    check_choice("form", form, FORMS)
    matrix = at_least_float32(as_matrix(weight), "weight")
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    gap = matrix @ matrix.mT - torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    if form == "norm":
        norm: Tensor = torch.linalg.matrix_norm(gap)
        return norm
    return gap.square().sum() if form == "squared" else gap.square().mean()
