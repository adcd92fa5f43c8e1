"""The `data` section: which samples, from where, in which batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ortho_cli.recipe.data_captions import CaptionedPictures
from ortho_cli.recipe.data_hints import HintedPictures
from ortho_cli.recipe.data_subject import SubjectPictures
from ortho_cli.recipe.data_text import GLUE, Docstrings, TextTable
from ortho_cli.recipe.instruct import Instructions
from ortho_cli.recipe.section import Count, Rejection, Section, Share, Text, Whole
from ortho_cli.recipe.translation import Parallel

__all__ = [
    "GLUE", "CaptionedPictures", "Data", "Docstrings", "HintedPictures", "Images", "Instructions", "Parallel", "Series",
    "TextTable",
]  # fmt: skip


class Images(Section):
    """Images: a known data set, or a folder, with one sub-folder a class where there are classes."""

    kind: ClassVar[str] = "pictures"
    name: Literal[
        "digits", "mnist", "cifar10", "cifar100", "tiny-imagenet", "imagenet", "faces", "dsprites", "celeba",
        "lsun-church", "ffhq", "anime-faces", "image-folder",
    ] = Field(
        description="The data set; digits comes with scikit-learn, faces with scikit-image, and both need no download. "
        "Those from faces to anime-faces have no classes: they are for the task gan."
    )  # fmt: skip
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
        """What comes with a library has no source, a folder needs one, and nothing is named twice."""
        library = {"digits": "scikit-learn", "faces": "scikit-image"}.get(self.name)
        if library is not None:
            for key in ("path", "source"):
                if getattr(self, key) is not None:
                    yield (key,), f"{self.name} comes with {library} and has none; remove the line"
        elif self.name == "image-folder" and self.path is None and self.source is None:
            yield ("name",), "an image-folder needs path: FOLDER (or source: HUB_ID)"
        for key in ("augment", "classes"):
            counted = Counter(getattr(self, key) or ())
            for word in (word for word, count in counted.items() if count > 1):
                yield (key,), f"{word} is named {counted[word]} times"


class Series(Section):
    """Values over time, a column a channel: electricity transformers (ETT), brain waves, or a CSV file of one's own."""

    kind: ClassVar[str] = "series"
    name: Literal["etth1", "etth2", "ettm1", "ettm2", "eeg", "series-csv"] = Field(
        description="The series; eeg comes with matplotlib and needs no download."
    )
    path: Text | None = Field(
        default=None, description="A CSV file, or the folder it is in; it wins over the hub, which has ETT."
    )
    source: Text | None = Field(default=None, description="Another hub file: ORG/NAME[@revision]:FILE.")
    columns: Annotated[tuple[Text, ...], Field(min_length=1)] | None = Field(
        default=None, description="Columns to forecast, by their names; null: all but that of the dates."
    )
    shares: tuple[Share, Share] | None = Field(
        default=None,
        description="Shares of the rows to train and to validate on, the rest is for the test; null: of ETT the first "
        "12, the next 4 and the next 4 months, of others 0.6 and 0.2.",
    )
    judge: Literal["val", "test"] = Field(
        default="test", description="The part that evaluation is on: val to choose settings by, test to report."
    )
    batch: Count = Field(default=32, description="Windows a step, over all processes and accumulated parts together.")
    eval_batch: Count | None = Field(default=None, description="Windows a batch in evaluation; null: as in training.")
    workers: Whole = Field(default=0, description="Processes that load data; they do not change the result.")

    def problems(self) -> Iterator[Rejection]:
        """Brain waves have no source, a file of one's own needs one, and every part of the rows has some."""
        if self.name == "eeg":
            for key in ("path", "source"):
                if getattr(self, key) is not None:
                    yield (key,), "eeg comes with matplotlib and has none; remove the line"
        elif self.name == "series-csv" and self.path is None and self.source is None:
            yield ("name",), "a series-csv needs path: FILE (or source: HUB_ID:FILE)"
        for word, count in Counter(self.columns or ()).items():
            if count > 1:
                yield ("columns",), f"{word} is named {count} times"
        if self.shares is not None and not (min(self.shares) > 0 and sum(self.shares) < 1):
            yield ("shares",), f"{self.shares[0]} and {self.shares[1]} leave one of the three parts without rows"


Data = Annotated[
    Images
    | CaptionedPictures
    | HintedPictures
    | SubjectPictures
    | GLUE
    | TextTable
    | Docstrings
    | Series
    | Instructions
    | Parallel,
    Field(discriminator="name"),
]
