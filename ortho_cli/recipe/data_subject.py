"""The `data` section of subject-driven generation: a handful of pictures of one thing or one animal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from ortho_cli.recipe.section import Count, Rejection, Section, Text, Whole

__all__ = ["SubjectPictures"]


class SubjectPictures(Section):
    """Pictures of one subject: those of the DreamBooth set, a folder of one's own, or scikit-image's cat."""

    kind: ClassVar[str] = "pictures of a subject"
    name: Literal["dreambooth", "subject-folder", "skimage-cat"] = Field(
        description="The data set; skimage-cat is four views of the cat that comes with scikit-image."
    )
    path: Text | None = Field(
        default=None,
        description="A folder, which wins over the hub: of dreambooth with one sub-folder a subject, else of pictures.",
    )
    source: Text | None = Field(default=None, description="A hub id other than google/dreambooth.")
    batch: Count = Field(
        default=1, description="Samples a step, over all processes and accumulated parts; a sample has a class picture."
    )
    eval_batch: Count | None = Field(default=None, description="Samples a batch in evaluation; null: as in training.")
    workers: Whole = Field(default=0, description="Processes that load data; they do not change the result.")
    size: Count = Field(default=512, description="Side of the pictures in pixels.")
    crop: Literal["random", "center"] = Field(
        default="random", description="Which square of a picture that is none is seen in training."
    )

    def problems(self) -> Iterator[Rejection]:
        """A folder of one's own is somewhere, scikit-image's cat nowhere else."""
        if self.name == "subject-folder" and self.path is None:
            yield ("name",), "subject-folder needs path: FOLDER, with some pictures of the subject"
        for key in ("path", "source"):
            if self.name == "skimage-cat" and getattr(self, key) is not None:
                yield (key,), "skimage-cat comes with scikit-image and has none; remove the line"
        if self.name == "subject-folder" and self.source is not None:
            yield ("source",), "subject-folder is local; the hub's pictures are data.name: dreambooth"
