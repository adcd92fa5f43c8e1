"""Models of diffusion in the `model` section."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from ortho_cli.recipe.architecture import Architecture
from ortho_cli.recipe.section import Rejection, Text

__all__ = ["StableDiffusion"]


class StableDiffusion(Architecture):
    """Stable Diffusion: a UNet that predicts noise, behind an autoencoder and a text encoder, which stay frozen."""

    kind: ClassVar[str] = "diffusion"
    is_its_base: ClassVar[bool] = True
    name: Literal["stable-diffusion"] = Field(description="The architecture is the base's.")
    base: Text | None = Field(
        default=None,
        description="An LDM .safetensors or .ckpt file, a diffusers folder, a hub id, or a run that trained all "
        "weights; null: random weights of the given size.",
    )
    config: Text | None = Field(
        default=None,
        description="A diffusers folder or hub id with the tokenizer, scheduler and configurations that a bare file "
        "lacks; null: those of Stable Diffusion 1.5, from the hub's cache.",
    )
    size: Literal["sd15", "tiny"] = Field(
        default="sd15", description="Of random weights: Stable Diffusion 1.5's, or a tiny one's that knows letters."
    )
    frozen: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="How weights that do not train are kept; half takes half the memory."
    )

    def problems(self) -> Iterator[Rejection]:
        """A base has its own size."""
        if self.base is not None and self.size != "sd15":
            yield ("size",), "is for random weights; a base has its own size, remove the line"
        if self.base is None and self.config is not None:
            yield ("config",), "goes with a base; random weights have the configuration of their size"
