"""Tasks of diffusion models in the `task` section."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ortho_cli.recipe.section import Count, NotNegative, Positive, Section, Text

__all__ = ["TextToImage"]


class TextToImage(Section):
    """Pictures from words, by the error of the noise that a diffusion model predicts."""

    kind: ClassVar[str] = "captioned pictures"
    model_kind: ClassVar[str] = "diffusion"
    name: Literal["text_to_image"] = Field(description="What is trained.")
    min_snr: Positive | None = Field(
        default=None,
        description="Gamma of min-SNR weighting (arXiv:2303.09556), 5 in the paper; null: all count alike.",
    )
    noise_offset: NotNegative = Field(
        default=0.0, description="How much noise all of a channel shares, for very dark and bright pictures."
    )
    validation_prompts: tuple[Text, ...] = Field(
        default=(), description="What samples show, drawn from the same noise every time."
    )
    steps: Count = Field(default=25, description="Steps of DDIM by which a sample is drawn.")
    guidance: NotNegative = Field(
        default=7.5, description="How much the prompt counts in a sample; 1: as it was trained."
    )
    compat: Annotated[None, Field(description="No published number needs a deviation of this task.")] = None
