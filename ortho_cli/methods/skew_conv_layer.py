"""A convolution that is an orthogonal map by construction (SOC): the exponential of a skew-symmetric one."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor, nn

from ortho_cli.errors import TargetError
from ortho_cli.linalg.precision import at_least_float32
from ortho_cli.linalg.skew_conv import (
    EPS,
    Vectors,
    convolution_exponential,
    four_norms,
    power_iteration,
    skew_filter,
    space_to_depth,
    start_vectors,
)

__all__ = ["SkewConv2d"]

# The four norms bound the Jacobian's by the kernel's side times them: with this factor by 2.1 for a 3 x 3 kernel, whose
# exponential five terms give to 0.12 and ten to 1e-4 in the worst case (and a thousand times better in practice).
CORRECTION = 0.7
# Power iterations: at the start and every so many training passes, and in between.
REFRESH_EVERY, REFRESH, FOLLOW = 200, 50, 1
NORMS = 4


class SkewConv2d(nn.Module):
    """A 2-d convolution whose Jacobian has orthonormal columns, or rows where outputs are fewer than inputs.

    Zero padding keeps the size; with a stride every block of places is turned into channels first, so the size is that
    of `nn.Conv2d(..., padding=kernel // 2)`. Computed in at least float32, whatever autocast says.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        kernel_size: odd.
        stride: the same along both axes.
        bias: whether one is added.
        terms: convolutions in training; `eval_terms` in evaluation.
        generator: draws the start; None: torch's.

    Raises:
        TargetError: an even kernel, or no positive stride.

    Cost: `terms` convolutions of `n = max(out, in stride^2)` channels each way, however few the inputs are.
    Reference: Singla and Feizi, "Skew Orthogonal Convolutions", arXiv:2105.11417.

    >>> layer = SkewConv2d(3, 8, 3).eval()
    >>> images = torch.randn(2, 3, 6, 6)
    >>> outputs = layer(images) - layer.bias[:, None, None]
    >>> torch.allclose(outputs.norm(), images.norm(), rtol=1e-4)
    True
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        bias: bool = True,
        *,
        terms: int = 5,
        eval_terms: int = 10,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0 or kernel_size < 1 or stride < 1:
            raise TargetError(
                f"a skew convolution needs an odd kernel and a stride of 1 or more, found {kernel_size} and {stride}"
            )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride = kernel_size, stride
        self.terms, self.eval_terms = terms, eval_terms
        self.correction = CORRECTION if kernel_size > 1 else 1.0
        self.passes = 0  # forwards in training
        width = max(out_channels, in_channels * stride**2)
        draw = torch.randn(width, width, kernel_size, kernel_size, generator=generator, device="cpu") / sqrt(width)
        self.random_conv_filter = nn.Parameter(_placed(draw))
        vectors = power_iteration(skew_filter(draw), start_vectors(tuple(draw.shape), generator), REFRESH)
        for index, (right, left) in enumerate(zip(*vectors, strict=True), start=1):
            self.register_buffer(f"u{index}", _placed(right))
            self.register_buffer(f"v{index}", _placed(left))
        shift = (2 * torch.rand(out_channels, generator=generator, device="cpu") - 1) / sqrt(out_channels)
        self.bias = nn.Parameter(_placed(shift)) if bias else None

    def vectors(self) -> Vectors:
        """The buffers `u1` to `u4` and `v1` to `v4`: copies, so that a graph keeps those it was built with."""
        right, left = ([getattr(self, f"{kind}{i + 1}").clone() for i in range(NORMS)] for kind in "uv")
        return Vectors(tuple(right), tuple(left))

    def filters(self) -> Tensor:
        """The skew-symmetric filter, scaled so that a few terms give its exponential; in training follows its norms."""
        filters = skew_filter(at_least_float32(self.random_conv_filter))
        vectors = Vectors(*(tuple(each.to(filters.dtype) for each in part) for part in self.vectors()))
        if self.training:
            iterations = REFRESH if self.passes % REFRESH_EVERY == 0 else FOLLOW
            self.passes += 1
            vectors = power_iteration(filters.detach(), vectors, iterations)
            for index, (right, left) in enumerate(zip(*vectors, strict=True), start=1):
                getattr(self, f"u{index}").copy_(right)
                getattr(self, f"v{index}").copy_(left)
        # One channel has no skew-symmetric 1 x 1 filter but 0, whose exponential is the identity.
        return self.correction * filters / four_norms(filters, vectors).min().clamp_min(EPS)

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, enabled=False):
            filters = self.filters()
            found = space_to_depth(inputs.to(filters.dtype), self.stride)
            more = filters.shape[1] - found.shape[1]
            found = nn.functional.pad(found, (0, 0, 0, 0, 0, more))
            found = convolution_exponential(found, filters, self.terms if self.training else self.eval_terms)
            found = found[:, : self.out_channels]
            if self.bias is not None:
                found = found + self.bias[:, None, None]
        return found.to(inputs.dtype)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"terms={self.terms}, eval_terms={self.eval_terms}"
        )


def _placed(drawn: Tensor) -> Tensor:
    """What was drawn on the CPU, on the device that is in force (meta, in a dry run)."""
    return drawn.to(torch.get_default_device()).to(torch.get_default_dtype())
