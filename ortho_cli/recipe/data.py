"""The `data` section: which samples, from where, in which batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from ortho_cli.recipe.section import Count, Rejection, Section, Text, Whole

__all__ = ["Data", "Images"]


class Images(Section):
    """Labelled images: a known data set, or a folder with one sub-folder a class."""

    name: Literal["digits", "mnist", "cifar10", "cifar100", "tiny-imagenet", "imagenet", "image-folder"] = Field(
        description="The data set; digits comes with scikit-learn and needs no download."
    )
    path: Text | None = Field(
        default=None, description="A local folder, which wins over the hub; see: ortho recipe check --data."
    )
    source: Text | None = Field(default=None, description="A hub id other than the usual one.")
    batch: Count = Field(default=64, description="Samples a step, over all processes and accumulated parts together.")
    augment: tuple[Literal["crop", "flip", "cutout", "randaugment"], ...] = Field(
        default=(), description="Random changes of training images, in this order."
    )
    classes: Annotated[tuple[Whole, ...], Field(min_length=1)] | None = Field(
        default=None, description="Keep the samples of these classes only; the model keeps an output for every class."
    )
    workers: Whole = Field(default=0, description="Processes that load data; they do not change the result.")
    eval_batch: Count | None = Field(default=None, description="Samples a batch in evaluation; null: as in training.")
    size: Count | None = Field(default=None, description="Resize images to this side; null: as they are.")

    def problems(self) -> Iterator[Rejection]:
        """Digits has no source, a folder needs one, and nothing is named twice."""
        if self.name == "digits":
            for key in ("path", "source"):
                if getattr(self, key) is not None:
                    yield (key,), "digits comes with scikit-learn and has none; remove the line"
        elif self.name == "image-folder" and self.path is None and self.source is None:
            yield ("name",), "an image-folder needs path: FOLDER (or source: HUB_ID)"
        for key in ("augment", "classes"):
            counted = Counter(getattr(self, key) or ())
            for word in (word for word, count in counted.items() if count > 1):
                yield (key,), f"{word} is named {counted[word]} times"


Data = Images
