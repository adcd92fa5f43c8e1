"""The `task` section: what is trained, by which loss."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ortho_cli.recipe.section import NotNegative, Section, Share

__all__ = ["Classify", "Task"]


class Classify(Section):
    """Images into classes, by cross-entropy."""

    name: Literal["classify"] = Field(description="What is trained.")
    label_smoothing: Share = Field(default=0.0, description="Probability that is spread over all classes.")
    mixup: NotNegative = Field(
        default=0.0, description="Alpha of the Beta law by which pairs of images are mixed; 0: not at all."
    )
    compat: None = Field(default=None, description="No published number needs a deviation of this task.")


Task = Classify
