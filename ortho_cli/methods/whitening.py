r"""The whitening layer: batch normalisation that also decorrelates channels (ZCA, decorrelated batch normalisation).

Of a batch `X (n, M)` with covariance :math:`\Sigma` it makes :math:`\gamma (\Sigma + \epsilon I)^{-1/2} (X - \mu) +
\beta`, group by group of channels. The covariance of what comes out is :math:`\Sigma (\Sigma + \epsilon I)^{-1}`:
the identity, but for directions in which there is no more than the ridge.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ortho_cli.linalg.precision import at_least_float32
from ortho_cli.linalg.rootm import inverse_sqrtm

__all__ = ["Whitening", "grouped", "moments", "sum_over_processes"]


class Whitening(nn.Module):
    """Whiten groups of channels with the statistics of a batch; in evaluation with running ones.

    Args:
        features: channels, the second dimension of the input.
        groups: of consecutive channels that are whitened together; divides `features`.
        ridge: added to every eigenvalue of the covariance; the gain is at most its inverse root.
        momentum: share of a batch in the running statistics.
        affine: a weight and a bias for each channel.
        solver: of the inverse root, a method of :func:`~ortho_cli.linalg.rootm.inverse_sqrtm`.
        averages_whitening: the running average is of whitening matrices, as published, in place of covariances.

    Shapes: `(B, features, ...)` to the same, in the input's dtype and memory format; computed in at least float32.
    Statistics in training are over all processes of the default group, as with `nn.SyncBatchNorm`.
    Cost: three products of `n` multiply-adds for each value, `n = features / groups`, and a root of `n^3`; backward
        three more.
    Reference: Huang et al., arXiv:1804.08450; Song et al., arXiv:2207.02119.

    >>> import ortho_cli as ortho
    >>> layer = ortho.Whitening(2, ridge=1e-6, affine=False)
    >>> x = torch.tensor([[1.0, 2.0], [3.0, 2.0], [2.0, 5.0], [2.0, 3.0]])
    >>> torch.cov(layer(x).T, correction=0).abs().round(decimals=3).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """

    running_mean: Tensor
    running_covariance: Tensor | None
    running_whitening: Tensor | None

    def __init__(
        self,
        features: int,
        groups: int = 1,
        *,
        ridge: float = 1e-2,
        momentum: float = 0.1,
        affine: bool = True,
        solver: str = "eigh",
        averages_whitening: bool = False,
    ) -> None:
        super().__init__()
        if features % groups:
            raise ValueError(f"{features} channels do not divide into {groups} groups")
        self.features, self.groups = features, groups
        self.ridge, self.momentum, self.solver = ridge, momentum, solver
        width = features // groups
        self.weight = nn.Parameter(torch.ones(features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(features)) if affine else None
        eye = torch.eye(width).repeat(groups, 1, 1)
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_covariance", None if averages_whitening else eye)
        self.register_buffer("running_whitening", eye if averages_whitening else None)

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.dim() < 2 or inputs.shape[1] != self.features:
            raise ValueError(f"expected (B, {self.features}, ...), found shape {tuple(inputs.shape)}")
        with torch.autocast(inputs.device.type, enabled=False):
            values = grouped(at_least_float32(inputs, "input"), self.groups)
            if self.training:
                mean, covariance, centered = moments(values)
                whitening = self._root(covariance)
                self._average(mean, covariance, whitening)
                return self._outputs(centered, whitening, None, inputs)
            return self._outputs(values, self._running_root(), self._rows(self.running_mean), inputs)

    def _running_root(self) -> Tensor:
        if self.running_whitening is not None:
            return self.running_whitening
        assert self.running_covariance is not None
        return self._root(self.running_covariance)

    def _root(self, covariance: Tensor) -> Tensor:
        return inverse_sqrtm(covariance, ridge=self.ridge, method=self.solver)

    def _rows(self, channels: Tensor) -> Tensor:
        return channels.reshape(self.groups, -1, 1)

    @torch.no_grad()
    def _average(self, mean: Tensor, covariance: Tensor, whitening: Tensor) -> None:
        self.running_mean.lerp_(mean.flatten().to(self.running_mean), self.momentum)
        if self.running_whitening is not None:
            self.running_whitening.lerp_(whitening.to(self.running_whitening), self.momentum)
        elif self.running_covariance is not None:
            self.running_covariance.lerp_(covariance.to(self.running_covariance), self.momentum)

    def _outputs(self, values: Tensor, whitening: Tensor, mean: Tensor | None, like: Tensor) -> Tensor:
        """Whiten; weight and bias go into the matrix and the offset, which are small."""
        whitening = whitening.to(values.dtype)
        if self.weight is not None:
            whitening = self._rows(self.weight).to(values.dtype) * whitening
        offset = values.new_zeros(1, 1, 1) if self.bias is None else self._rows(self.bias).to(values.dtype)
        if mean is not None:
            offset = offset - whitening @ mean.to(values.dtype)
        if values.stride(-1) == 1:
            made = torch.baddbmm(offset, whitening, values)
        else:  # channels last: the same from the other side, so that what comes out lies as what went in
            made = torch.baddbmm(offset.mT, values.mT, whitening.mT).mT
        swapped = made.reshape(self.features, like.shape[0], *like.shape[2:]).transpose(0, 1)
        return swapped.to(like.dtype).contiguous(memory_format=_memory_format(like))

    def extra_repr(self) -> str:
        """The sizes, for people."""
        return f"{self.features}, groups={self.groups}, ridge={self.ridge:g}, solver={self.solver}"


def grouped(inputs: Tensor, groups: int) -> Tensor:
    """The channels `(B, C, ...)` as rows, `(groups, C / groups, M)`; a view where they lie last.

    >>> grouped(torch.zeros(2, 6, 3, 3), 2).shape
    torch.Size([2, 3, 18])
    """
    return inputs.transpose(0, 1).reshape(groups, inputs.shape[1] // groups, -1)


def moments(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased covariance over all processes, of rows of samples, and the rows about their mean.

    Args:
        values: `(..., n, M)`; M may differ between processes.

    Returns:
        `(..., n, 1)`, `(..., n, n)` and `(..., n, M)`; differentiable, through all processes.

    Cost: a product of `n M n`, and another one in backward.

    >>> mean, covariance, _ = moments(torch.tensor([[[1.0, 3.0]]]))
    >>> mean.item(), covariance.item()
    (2.0, 1.0)
    """
    count = values.new_tensor(values.shape[-1])
    if _is_shared():
        count = sum_over_processes(count)
    mean = sum_over_processes(values.sum(-1, keepdim=True)) / count
    centered = values - mean
    scatter: Tensor = _Scatter.apply(centered)  # type: ignore[no-untyped-call]
    return mean, sum_over_processes(scatter) / count, centered


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of a tensor over the processes that train together; its gradient is summed over them likewise.

    >>> sum_over_processes(torch.ones(2)).tolist()
    [1.0, 1.0]
    """
    summed: Tensor = _Sum.apply(tensor) if _is_shared() else tensor  # type: ignore[no-untyped-call]
    return summed


def _is_shared() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        summed = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        summed = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed


class _Scatter(torch.autograd.Function):
    """`X X^T`, whose gradient is one product with the symmetric part, where autograd makes two."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return rows @ rows.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        symmetric = gradient + gradient.mT
        found: Tensor = symmetric @ rows if rows.stride(-1) == 1 else (rows.mT @ symmetric).mT
        return found


def _memory_format(like: Tensor) -> torch.memory_format:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(like.dim(), torch.contiguous_format)
    return last if like.is_contiguous(memory_format=last) and not like.is_contiguous() else torch.contiguous_format
