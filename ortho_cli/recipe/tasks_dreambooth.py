"""The `task` section of subject-driven generation."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ortho_cli.recipe.section import Count, NotNegative, Positive, Rejection, Section, Text, Whole
from ortho_cli.recipe.subjects import INSTANCE_PROMPT, SUBJECTS, TOKEN, Subject, prompts

__all__ = ["Dreambooth"]


class Dreambooth(Section):
    """A diffusion model learns one subject from a few pictures, and keeps what it knows of the subject's class."""

    kind: ClassVar[str] = "pictures of a subject"
    model_kind: ClassVar[str] = "diffusion"
    name: Literal["dreambooth"] = Field(description="What is trained.")
    subject: Text | None = Field(
        default=None, description="One of the protocol's 30, which tells its class and prompts; null: one's own."
    )
    class_name: Text | None = Field(default=None, description="What one's own subject is, e.g. dog.")
    live: bool = Field(default=False, description="Whether one's own subject lives, which chooses ten of its prompts.")
    token: Text = Field(default=TOKEN, description="The word that stands for the subject.")
    prompt: Annotated[int, Field(ge=0, le=24)] | None = Field(
        default=None, description="The one of the 25 prompts that samples are drawn of; null: all of them."
    )
    prior: NotNegative = Field(default=1.0, description="Weight of the class pictures' loss; 0: there are none.")
    class_pictures: Count = Field(
        default=200, description="Pictures of the class, drawn by the base where they are missing; a sample has one."
    )
    class_folder: Text = Field(
        default="class-pictures", description="The folder that has, or gets, a sub-folder of them for each class."
    )
    noise_offset: NotNegative = Field(
        default=0.0, description="How much noise all of a channel shares, for very dark and bright pictures."
    )
    min_snr: Positive | None = Field(
        default=None,
        description="Gamma of min-SNR weighting (arXiv:2303.09556), 5 in the paper; null: all count alike.",
    )
    samples: Whole = Field(default=4, description="Pictures of each prompt, whenever samples are drawn.")
    steps: Count = Field(default=25, description="Steps of DPM-Solver++ by which a picture is drawn.")
    guidance: NotNegative = Field(default=7.5, description="How much the prompt counts in it; 1: as it was trained.")
    compat: None = Field(default=None, description="No published number needs a deviation of this task.")

    def problems(self) -> Iterator[Rejection]:
        """A subject is of the protocol, or its class is told."""
        if self.subject is not None and self.subject not in SUBJECTS:
            near = difflib.get_close_matches(self.subject, SUBJECTS, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            yield ("subject",), f"{hint}the protocol has {', '.join(SUBJECTS)}; of one's own give class_name alone"
        if (self.subject is None) == (self.class_name is None):
            found = "both" if self.subject else "neither"
            yield ("subject",), f"give a subject of the protocol or the class_name of one's own, found {found}"
        if self.subject is not None and self.live:
            yield ("live",), "goes with class_name; the protocol knows which of its subjects live"

    @property
    def shown(self) -> Subject:
        """Class and kind of the subject."""
        return SUBJECTS[self.subject] if self.subject is not None else Subject(str(self.class_name), self.live)

    @property
    def instance_prompt(self) -> str:
        """What the subject's pictures are trained with."""
        return INSTANCE_PROMPT.format(token=self.token, class_name=self.shown.class_name)

    @property
    def drawn(self) -> dict[int, str]:
        """The prompts that samples are drawn of, by their number in the protocol."""
        every = dict(enumerate(prompts(self.shown, self.token)))
        return every if self.prompt is None else {self.prompt: every[self.prompt]}

    @property
    def validation_prompts(self) -> tuple[str, ...]:
        """What `ortho generate` draws of a run where no prompt is given."""
        return tuple(self.drawn.values())
