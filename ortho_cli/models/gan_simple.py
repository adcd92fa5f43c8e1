"""The simple GANs of OroJaR and of NOG's disentanglement: transposed convolutions with instance norm, 64 and 128 px.

A single layer reads the latent code, so its weight alone decides in which directions a code moves the picture; the
published treatments act on it. arXiv:2108.07668, arXiv:2212.05599.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ortho_cli.errors import RecipeError

if TYPE_CHECKING:
    from ortho_cli.recipe.models import SimpleGAN as SimpleGANConfig

__all__ = ["SimpleDiscriminator", "SimpleGenerator", "build"]

# By the name in a recipe: channels before each doubling of the side (and after the last), and of the discriminator.
SIZES = {"gan64": 64, "gan128": 128}
GENERATOR = {"gan64": (512, 256, 128, 64, 64), "gan128": (1024, 1024, 512, 256, 128, 64)}
DISCRIMINATOR = {"gan64": (64, 128, 256, 512), "gan128": (64, 128, 256, 512, 1024)}
HIDDEN_ACTIVATION = {"gan64": True, "gan128": False}  # between the last two layers, as the released code has it
START = 4  # side of the first feature map
NORM_EPS = 1e-6
SLOPE = 0.2


def build(config: SimpleGANConfig, channels: int, size: int) -> tuple[nn.Module, nn.Module]:
    """Generator and discriminator of a recipe's `model` section, for pictures of a size.

    Raises:
        RecipeError: pictures of another size than the architecture's.
    """
    name = config.name
    if size != SIZES[name]:
        raise RecipeError(
            f"{name} makes pictures of {SIZES[name]} pixels; these have {size}", hint=f"set data.size: {SIZES[name]}"
        )

    def scaled(widths: tuple[int, ...]) -> list[int]:
        return [max(1, round(config.width * width)) for width in widths]

    generator = SimpleGenerator(config.noise, channels, scaled(GENERATOR[name]))
    return generator, SimpleDiscriminator(channels, scaled(DISCRIMINATOR[name]), activate=HIDDEN_ACTIVATION[name])


def _norm(width: int) -> nn.Module:
    return nn.InstanceNorm2d(width, eps=NORM_EPS, affine=True)


class SimpleGenerator(nn.Module):
    """Pictures from a latent code.

    Args:
        noise: columns of the code; a traversal moves each.
        channels: 1 or 3.
        widths: channels of the feature maps, of which each but the first is twice as large as the one before.

    Shapes: `(B, noise)` standard normal, to `(B, channels, S, S)` in [-1, 1], ``S = 4 * 2 ** (len(widths) - 1)``.

    >>> tuple(SimpleGenerator(6, 1, [8, 4, 4])(torch.zeros(2, 6)).shape)
    (2, 1, 16, 16)
    """

    def __init__(self, noise: int, channels: int, widths: list[int]) -> None:
        super().__init__()
        self.noise_dim = noise
        self.latents = tuple(f"z{index:03d}" for index in range(noise))
        """Names of the leading columns of the noise: what a traversal moves."""
        self.project = nn.ConvTranspose2d(noise, widths[0], START)
        self.convs = nn.ModuleList(
            nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False) for before, after in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.Sequential(_norm(width), nn.LeakyReLU(SLOPE)) for width in widths[1:])
        self.to_picture = nn.Conv2d(widths[-1], channels, 3, padding=1)

    def latent_matrices(self) -> list[Tensor]:
        """The matrix by which the code enters, `(noise, features)`."""
        return [self.project.weight.flatten(1)]

    def forward(self, noise: Tensor) -> Tensor:
        features = self.project(noise[:, :, None, None])
        for conv, norm in zip(self.convs, self.norms, strict=True):
            features = norm(conv(features))
        return torch.tanh(self.to_picture(features))


class SimpleDiscriminator(nn.Sequential):
    """Tell real pictures by convolutions of stride two, normalised from the second on.

    Shapes: `(B, channels, S, S)` to `(B, 1)`, ``S = 4 * 2 ** len(widths)``.
    """

    def __init__(self, channels: int, widths: list[int], *, activate: bool) -> None:
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 4, 2, 1), nn.ReLU()]
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 4, 2, 1, bias=False), _norm(after), nn.ReLU()]
        head = [nn.Flatten(), nn.Linear(START**2 * widths[-1], widths[-1])]
        super().__init__(*layers, *head, *([nn.ReLU()] if activate else []), nn.Linear(widths[-1], 1))
