"""The `task` section: what is trained, by which loss."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ortho_cli.recipe.section import Count, NotNegative, Section, Share

__all__ = ["Classify", "Forecast", "Task"]


class Classify(Section):
    """Images into classes, by cross-entropy."""

    kind: ClassVar[str] = "pictures"
    name: Literal["classify"] = Field(description="What is trained.")
    label_smoothing: Share = Field(default=0.0, description="Probability that is spread over all classes.")
    mixup: NotNegative = Field(
        default=0.0, description="Alpha of the Beta law by which pairs of images are mixed; 0: not at all."
    )
    compat: None = Field(default=None, description="No published number needs a deviation of this task.")


class Forecast(Section):
    """The next values of series from the last ones, by the mean squared error."""

    kind: ClassVar[str] = "series"
    name: Literal["forecast"] = Field(description="What is trained.")
    input: Count = Field(default=96, description="Steps that are seen.")
    horizon: Count = Field(default=96, description="Steps behind them that are forecast.")
    compat: None = Field(default=None, description="No published number needs a deviation of this task.")


Task = Annotated[Classify | Forecast, Field(discriminator="name")]
