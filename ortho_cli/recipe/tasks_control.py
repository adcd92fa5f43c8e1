"""The `task` section of controllable generation."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ortho_cli.recipe.section import Count, NotNegative, Positive, Section, Whole

__all__ = ["Control"]


class Control(Section):
    """Pictures to a prompt and a hint, by a diffusion model that listens to a hint encoder."""

    kind: ClassVar[str] = "pictures with hints"
    model_kind: ClassVar[str] = "diffusion"
    name: Literal["control"] = Field(description="What is trained.")
    prompt_dropout: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0, description="Share of samples that are trained without their prompt; the published trainers' is 0."
    )
    min_snr: Positive | None = Field(
        default=None,
        description="Gamma of min-SNR weighting (arXiv:2303.09556), 5 in the paper; null: all count alike.",
    )
    noise_offset: NotNegative = Field(
        default=0.0, description="How much noise all of a channel shares, for very dark and bright pictures."
    )
    samples: Whole = Field(default=4, description="Rows of hint, drawn and real picture in a sheet of samples.")
    steps: Count = Field(default=50, description="Steps of DDIM by which a sample is drawn.")
    guidance: NotNegative = Field(
        default=9.0, description="How much the prompt counts in a sample; 1: as it was trained."
    )
    scored: Whole = Field(
        default=0, description="Pictures that an evaluation draws, to compare their edges; for canny hints."
    )
    compat: None = Field(default=None, description="No published number needs a deviation of this task.")
