"""The `model` section: an architecture with its sizes, and the weights it starts from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ortho_cli.recipe.architecture import Architecture
from ortho_cli.recipe.instruct import CausalLM, TinyLM
from ortho_cli.recipe.models_diffusion import StableDiffusion
from ortho_cli.recipe.models_text import HFText
from ortho_cli.recipe.section import Count, Positive, Rejection, Share, Text
from ortho_cli.recipe.translation import TransformerBase, TransformerSmall

__all__ = [
    "MLP", "VGG", "Architecture", "CausalLM", "EigenGAN", "Forecaster", "HFImage", "HFText", "Model", "ResNet",
    "ResNet32x2", "SimpleGAN", "SmallStemResNet", "StableDiffusion", "Timm", "TinyLM", "TransformerBase",
    "TransformerSmall", "VitB16", "VitMini", "WideResNet",
]  # fmt: skip

Base = Annotated[
    Text | None,
    Field(description="Weights to start from: a run, a file, a folder or a hub id; null: random ones."),
]
Patch = Annotated[Count, Field(description="Side of a patch in pixels.")]
Depth = Annotated[Count, Field(description="Number of blocks.")]
Heads = Annotated[Count, Field(description="Attention heads in a block.")]
Width = Annotated[Count, Field(description="Width of a token.")]
QKVBias = Annotated[bool, Field(description="Biases in the query, key and value projections.")]


class _Pictures(Architecture):
    """A model of pictures."""

    kind: ClassVar[str] = "pictures"


class ResNet(_Pictures):
    """The CIFAR ResNet of 6n + 2 layers, 16, 32 and 64 channels wide."""

    name: Literal["resnet20", "resnet32", "resnet44", "resnet56", "resnet110"] = Field(description="Its depth.")
    norm: Literal["batch", "group"] = Field(default="batch", description="The normalisation after each convolution.")
    groups: Count = Field(default=32, description="Groups of a group norm, at most a quarter of the channels.")
    shortcut: Literal["A", "B"] = Field(
        default="A", description="Where the width changes: A pads with zeros, B is a 1x1 convolution with a norm."
    )
    compat: Literal["paper-head"] | None = Field(
        default=None, description="paper-head: GOR's script has 1000 outputs whatever the number of classes."
    )
    base: Base = None


class ResNet32x2(_Pictures):
    """ResNet-32 of 64, 128 and 256 channels with projections as shortcuts (EigenDamage, FNL)."""

    name: Literal["resnet32x2"] = Field(description="The architecture.")
    width: Positive = Field(default=1.0, description="All channels times this.")
    base: Base = None


class SmallStemResNet(_Pictures):
    """ResNet-18, 34 or 50 in four stages, with a first layer for small pictures."""

    name: Literal["resnet18", "resnet34", "resnet50"] = Field(description="Its depth.")
    width: Positive = Field(default=1.0, description="All channels times this.")
    base: Base = None


class VGG(_Pictures):
    """VGG19 with batch norm and one linear layer (EigenDamage, FNL)."""

    name: Literal["vgg19"] = Field(description="The architecture.")
    width: Positive = Field(default=1.0, description="All channels times this.")
    base: Base = None


class WideResNet(_Pictures):
    """The wide residual network, WRN-28-10 as it stands."""

    name: Literal["wrn"] = Field(description="The architecture.")
    depth: Count = Field(default=28, description="Layers, 6n + 4.")
    width: Count = Field(default=10, description="Channels over 16, 32 and 64.")
    base: Base = None

    def problems(self) -> Iterator[Rejection]:
        """Three stages of blocks of two."""
        if (self.depth - 4) % 6 or self.depth < 10:
            yield ("depth",), f"must be 6n + 4 (10, 16, 22, 28, 40 ...), found {self.depth}"


class _Transformer(Architecture):
    """What all transformers have."""

    name: str
    patch: Count
    depth: Depth
    heads: Heads
    dim: Width = 768
    mlp_ratio: Positive = Field(default=4.0, description="Width of a block's MLP over that of a token.")
    dropout: Share = Field(default=0.0, description="Share of activations dropped in the blocks.")
    base: Base = None

    def problems(self) -> Iterator[Rejection]:
        """Heads share the width evenly."""
        if self.dim % self.heads:
            yield ("dim",), f"a width of {self.dim} cannot be shared by {self.heads} heads; take a multiple of heads"


class _Vit(_Transformer, _Pictures):
    """What both sizes of vision transformer have."""

    patch: Patch
    qkv_bias: QKVBias


class VitMini(_Vit):
    """The small vision transformer of OIALR's CIFAR-10 runs, 42.7 million parameters as it stands."""

    name: Literal["vit-mini"] = Field(description="The architecture.")
    patch: Patch = 8
    depth: Depth = 6
    heads: Heads = 6
    qkv_bias: QKVBias = False


class VitB16(_Vit):
    """ViT-B/16, 86.6 million parameters as it stands."""

    name: Literal["vit-b16"] = Field(description="The architecture.")
    patch: Patch = 16
    depth: Depth = 12
    heads: Heads = 12
    qkv_bias: QKVBias = True


class MLP(_Pictures):
    """Fully connected layers with ReLU between them."""

    name: Literal["mlp"] = Field(description="The architecture.")
    hidden: tuple[Count, ...] = Field(default=(64, 64), description="Widths of the hidden layers.")
    base: Base = None


class HFImage(_Pictures):
    """Any image classifier of transformers (AutoModelForImageClassification)."""

    is_its_base: ClassVar[bool] = True
    name: Literal["hf-image"] = Field(description="The architecture is the base's.")
    base: Text = Field(description="A transformers folder or hub id.")


class Timm(_Pictures):
    """Any architecture of timm, with timm's parameter names."""

    name: Literal["timm"] = Field(description="The library.")
    architecture: Text = Field(description="What timm.create_model calls it, e.g. resnetrs101.")
    drop_rate: Share = Field(default=0.0, description="Share of the features dropped before the classifier.")
    base: Base = None


class Forecaster(_Transformer):
    """A transformer that forecasts series, each channel from its own past, trend and season apart."""

    kind: ClassVar[str] = "series"
    name: Literal["forecaster"] = Field(description="The architecture.")
    patch: Annotated[Count, Field(description="Steps in a token; divides the task's input.")] = 8
    depth: Depth = 2
    heads: Heads = 8
    dim: Width = 512
    moving_average: Annotated[int, Field(ge=2)] = Field(
        default=25, description="Steps over which the mean is the trend, and what it leaves the season."
    )


class _Generating(Architecture):
    """A generator of pictures, and a discriminator."""

    kind: ClassVar[str] = "generating pictures"


class EigenGAN(_Generating):
    """A generator with a learnt subspace in every block (arXiv:2104.12476), and its discriminator."""

    name: Literal["eigengan"] = Field(description="The architecture; its size is that of the pictures.")
    basis: Count = Field(default=6, description="Directions in each block's subspace.")
    noise: Count = Field(default=512, description="Columns of noise beside the coordinates in the subspaces.")
    base_channels: Count = Field(default=16, description="Channels at the pictures' full size.")
    max_channels: Count = Field(default=512, description="Channels at most, where pictures are small.")
    base: Base = None


class SimpleGAN(_Generating):
    """Transposed convolutions with instance norm, for pictures of 64 or 128 pixels (arXiv:2108.07668)."""

    name: Literal["gan64", "gan128"] = Field(description="The architecture.")
    noise: Count = Field(default=30, description="Columns of the latent code.")
    width: Positive = Field(default=1.0, description="All channels times this.")
    base: Base = None


Model = Annotated[
    ResNet | ResNet32x2 | SmallStemResNet | VGG | WideResNet | VitMini | VitB16 | MLP | HFImage | Timm | Forecaster
    | HFText | CausalLM | TinyLM
    | EigenGAN | SimpleGAN | StableDiffusion | TransformerSmall | TransformerBase,
    Field(discriminator="name"),
]  # fmt: skip
