"""EigenGAN: a generator whose every block adds a point of a learnt linear subspace, and its discriminator.

Each block has a basis of a few directions in the space of its features. What one coordinate moves is then one thing at
one scale, from pose in the first block to colour in the last: arXiv:2104.12476.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ortho_cli.errors import RecipeError

if TYPE_CHECKING:
    from ortho_cli.recipe.models import EigenGAN as EigenGANConfig

__all__ = ["EigenDiscriminator", "EigenGenerator", "Subspace", "build"]

SLOPE = 0.2  # of every leaky ReLU
START = 4  # side of the first feature map
IMPORTANCE = 3.0  # the first coordinate's start; the others' fall evenly to it: 18, 15 ... 3 for six
SMALLEST = 8  # pixels: one block


def build(config: EigenGANConfig, channels: int, size: int) -> tuple[nn.Module, nn.Module]:
    """Generator and discriminator of a recipe's `model` section, for pictures of a size.

    Raises:
        RecipeError: a size that is no power of two.
    """
    if size < SMALLEST or size & (size - 1):
        raise RecipeError(
            f"eigengan makes pictures of a power of two of pixels, {SMALLEST} at least; these have {size}",
            hint=f"set data.size: {max(SMALLEST, 1 << (size - 1).bit_length())}",
        )
    widths = config.base_channels, config.max_channels
    generator = EigenGenerator(size, channels, config.basis, config.noise, *widths)
    return generator, EigenDiscriminator(size, channels, *widths)


class Subspace(nn.Module):
    """Coordinates to a point of an affine subspace: ``(importance * z) @ U + mu``.

    Args:
        basis: directions.
        dim: of the space they lie in.
    """

    def __init__(self, basis: int, dim: int) -> None:
        super().__init__()
        self.U = nn.Parameter(torch.empty(basis, dim))
        nn.init.orthogonal_(self.U)
        self.importance = nn.Parameter(IMPORTANCE * torch.arange(basis, 0, -1, dtype=torch.float32))
        self.mu = nn.Parameter(torch.zeros(dim))

    def forward(self, z: Tensor) -> Tensor:
        return torch.addmm(self.mu, z * self.importance, self.U)


class EigenBlock(nn.Module):
    """Twice as large a feature map, with a point of the subspace added before each of two convolutions."""

    def __init__(self, side: int, before: int, after: int, basis: int) -> None:
        super().__init__()
        self.shape = before, side, side
        self.subspace = Subspace(basis, before * side**2)
        self.subspace_conv1 = nn.ConvTranspose2d(before, before, 1)
        self.subspace_conv2 = nn.ConvTranspose2d(before, after, 3, 2, 1, output_padding=1)
        self.feature_conv1 = nn.ConvTranspose2d(before, after, 3, 2, 1, output_padding=1)
        self.feature_conv2 = nn.ConvTranspose2d(after, after, 3, 1, 1)

    def forward(self, features: Tensor, z: Tensor) -> Tensor:
        point = self.subspace(z).view(-1, *self.shape)
        features = self.feature_conv1(F.leaky_relu(features + self.subspace_conv1(point), SLOPE))
        found: Tensor = self.feature_conv2(F.leaky_relu(features + self.subspace_conv2(point), SLOPE))
        return found


class EigenGenerator(nn.Module):
    """Pictures from noise, of which the leading columns are the coordinates in the blocks' subspaces.

    Args:
        size: side of the pictures, a power of two.
        channels: 1 or 3.
        basis: directions in each block.
        noise: further columns of the noise, which make the first feature map.
        base: channels of the last feature map; each one before has twice as many.
        most: channels of any.

    Shapes: `(B, noise_dim)` standard normal, to `(B, channels, size, size)` in [-1, 1].

    >>> generator = EigenGenerator(16, 1, basis=2, noise=8, base=4, most=8)
    >>> generator.noise_dim, generator.latents
    (12, ('L0_D0', 'L0_D1', 'L1_D0', 'L1_D1'))
    >>> tuple(generator(torch.zeros(3, 12)).shape)
    (3, 1, 16, 16)
    """

    def __init__(self, size: int, channels: int, basis: int, noise: int, base: int, most: int) -> None:
        super().__init__()
        count = size.bit_length() - START.bit_length()
        widths = [min(most, base << (count - index)) for index in range(count + 1)]
        self.basis = basis
        self.latents = tuple(f"L{block}_D{index}" for block in range(count) for index in range(basis))
        """Names of the leading columns of the noise: what a traversal moves."""
        self.noise_dim = len(self.latents) + noise
        self.first = nn.Linear(noise, START**2 * widths[0])
        self.blocks = nn.ModuleList(
            EigenBlock(START << index, widths[index], widths[index + 1], basis) for index in range(count)
        )
        self.to_picture = nn.Conv2d(widths[-1], channels, 7, padding=3)

    def latent_matrices(self) -> list[Tensor]:
        """The matrices by which the coordinates of each block enter it, `(basis, dim)`."""
        spaces = [block.get_submodule("subspace") for block in self.blocks]
        return [space.importance[:, None] * space.U for space in spaces if isinstance(space, Subspace)]

    def forward(self, noise: Tensor) -> Tensor:
        coordinates, rest = noise.tensor_split([len(self.latents)], dim=1)
        features = self.first(rest).view(len(noise), -1, START, START)
        for block, z in zip(self.blocks, torch.split(coordinates, self.basis, dim=1), strict=True):
            features = block(features, z)
        return torch.tanh(self.to_picture(F.leaky_relu(features, SLOPE)))


class EigenDiscriminator(nn.Sequential):
    """Tell real pictures by convolutions of stride two.

    Shapes: `(B, channels, size, size)` to `(B, 1)`.
    """

    def __init__(self, size: int, channels: int, base: int, most: int) -> None:
        layers: list[nn.Module] = []

        def convolve(before: int, after: int, kernel: int = 3, stride: int = 1) -> None:
            layers.extend([nn.Conv2d(before, after, kernel, stride, kernel // 2), nn.LeakyReLU(SLOPE)])

        convolve(channels, base, kernel=7)
        width = base
        for _ in range(size.bit_length() - START.bit_length()):
            convolve(width, width)
            convolve(width, wider := min(2 * width, most), stride=2)
            width = wider
        convolve(width, width)
        head = [nn.Flatten(), nn.Linear(START**2 * width, width), nn.LeakyReLU(SLOPE), nn.Linear(width, 1)]
        super().__init__(*layers, *head)
