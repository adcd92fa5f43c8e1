r"""The nearest orthogonal gradient (NOG): a gradient's direction kept in every singular vector, its strength in none.

A weight of any layer is one matrix here, dimension 0 its rows: `(out, in kh kw)` of a convolution, `(in, out kh kw)` of
a transposed one. With the thin SVD `G = U S V^T` the nearest matrix with orthonormal rows or columns is `U V^T`, so a
step is as long in every direction that the gradient has. What it does not resolve (`polar.RESOLVED`) is left out, where
an SVD would complete it with directions that are noise.
"""

from __future__ import annotations

from torch import Tensor

from ortho_cli.errors import TargetError, check_choice
from ortho_cli.linalg.polar import METHODS, isometry, polar_factor, right_spectrum, tall_at_unit_scale

__all__ = ["as_matrix", "nearest_orthogonal"]


def as_matrix(weight: Tensor) -> Tensor:
    """A weight as one matrix, `(first dimension, product of the others)`; a view where strides allow.

    Raises:
        TargetError: fewer than two dimensions.

    >>> import torch
    >>> as_matrix(torch.zeros(8, 3, 5, 5)).shape
    torch.Size([8, 75])
    """
    if weight.dim() < 2:
        raise TargetError(
            f"a tensor of shape {tuple(weight.shape)} is no matrix", hint="take a weight of two or more dimensions"
        )
    return weight.reshape(weight.shape[0], -1)


def nearest_orthogonal(gradient: Tensor, *, method: str = "auto") -> Tensor:
    """Find the nearest semi-orthogonal tensor: what :func:`~ortho_cli.linalg.polar.polar_factor` finds, and no more.

    Args:
        gradient: two or more dimensions, any plain float type and strides; half types are computed in float32.
        method: "svd", "gram" or "polar-express" as there; "auto": "gram" on a CPU, elsewhere as there.

    Returns:
        Of the gradient's shape, in at least float32; singular values 1, or 0 for what the gradient does not resolve.

    Raises:
        TargetError: fewer than two dimensions, no entries, or no plain float.
        NumericsError: a value that is not finite.
        UsageError: no such method.

    Cost: for `m x n`, `k = min(m, n)`: `4 m n k + 11 k^3` flops by "gram", which an SVD of thin matrices takes many of.
    Reference: Song, Sebe and Wang, "Improving Covariance Conditioning of the SVD Meta-layer", arXiv:2207.02119.

    >>> import torch
    >>> nearest_orthogonal(torch.tensor([[3.0, 0.0, 0.0], [0.0, -2.0, 0.0]])).tolist()
    [[1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]
    """
    check_choice("method", method, METHODS)
    matrix = as_matrix(gradient)
    if method == "gram" or (method == "auto" and matrix.device.type == "cpu"):
        tall = tall_at_unit_scale(matrix).matrix
        factor = isometry(tall, right_spectrum(tall))  # without estimates of its error, which cost a thin matrix more
        factor = factor if matrix.shape[0] >= matrix.shape[1] else factor.mT
    else:
        factor = polar_factor(matrix, method=method).factor
    return factor.reshape(gradient.shape)
