"""The `task` section: what is trained, by which loss."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ortho_cli.recipe.instruct import Instruct
from ortho_cli.recipe.section import Count, NotNegative, Section, Share
from ortho_cli.recipe.tasks_control import Control
from ortho_cli.recipe.tasks_diffusion import TextToImage
from ortho_cli.recipe.tasks_dreambooth import Dreambooth
from ortho_cli.recipe.tasks_text import Glue
from ortho_cli.recipe.translation import Translate

__all__ = ["GAN", "Classify", "Control", "Forecast", "Glue", "Instruct", "Task", "TextToImage", "Translate"]


class Classify(Section):
    """Images into classes, by cross-entropy."""

    kind: ClassVar[str] = "pictures"
    model_kind: ClassVar[str] = "pictures"
    name: Literal["classify"] = Field(description="What is trained.")
    label_smoothing: Share = Field(default=0.0, description="Probability that is spread over all classes.")
    mixup: NotNegative = Field(
        default=0.0, description="Alpha of the Beta law by which pairs of images are mixed; 0: not at all."
    )
    compat: None = Field(default=None, description="No published number needs a deviation of this task.")


class Forecast(Section):
    """The next values of series from the last ones, by the mean squared error."""

    kind: ClassVar[str] = "series"
    model_kind: ClassVar[str] = "series"
    name: Literal["forecast"] = Field(description="What is trained.")
    input: Count = Field(default=96, description="Steps that are seen.")
    horizon: Count = Field(default=96, description="Steps behind them that are forecast.")
    compat: None = Field(default=None, description="No published number needs a deviation of this task.")


class GAN(Section):
    """Pictures from noise, by a generator against a discriminator."""

    kind: ClassVar[str] = "pictures"
    model_kind: ClassVar[str] = "generating pictures"
    name: Literal["gan"] = Field(description="What is trained.")
    loss: Literal["hinge", "hinge-clipped", "non-saturating", "lsgan", "vanilla"] = Field(
        default="hinge",
        description="The adversarial loss; hinge-clipped stops at pictures that pass (EigenGAN's port), vanilla "
        "halves the discriminator's.",
    )
    r1: NotNegative = Field(
        default=0.0, description="Weight of the squared gradient at real pictures (arXiv:1801.04406), where it is due."
    )
    r1_every: Count = Field(default=16, description="Batches of which one has the R1 penalty.")
    gradient_penalty: NotNegative = Field(
        default=0.0, description="Weight of the gradient's distance from length 1 between pictures (arXiv:1704.00028)."
    )
    augment: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0, description="Probability of each differentiable augmentation (arXiv:2006.10738); 0: none."
    )
    samples: Count = Field(default=64, description="Pictures that are shown, the same noise every time.")
    compat: None = Field(default=None, description="No published number needs a deviation of this task.")


Task = Annotated[
    Classify | Control | Dreambooth | Glue | Forecast | Instruct | GAN | TextToImage | Translate,
    Field(discriminator="name"),
]
