"""The `data` section of controllable generation: pictures with a prompt each, and the hints they are drawn from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from ortho_cli.recipe.section import Count, NotNegative, Rejection, Section, Text, Whole

__all__ = ["HINTS", "HintKind", "HintedPictures"]

HintKind = Literal["segm", "canny", "landmark", "depth", "sketch", "densepose"]
# The hints that come with a set; a folder of one's own may have any. Canny is made of the pictures where it is no file.
HINTS: dict[str, tuple[HintKind, ...]] = {
    "ade20k-hints": ("segm", "canny"),
    "coco-hints": ("canny", "depth", "sketch"),
    "celebahq-hints": ("landmark", "canny"),
    "deepfashion-hints": ("densepose", "canny"),
    "skimage-hints": ("canny",),
}


class HintedPictures(Section):
    """Pictures with prompts and hints: the published sets in their own layout, a folder, or those of scikit-image."""

    kind: ClassVar[str] = "pictures with hints"
    name: Literal[
        "ade20k-hints", "coco-hints", "celebahq-hints", "deepfashion-hints", "skimage-hints", "hint-folder"
    ] = Field(description="The data set; that of scikit-image needs no download, and has canny hints only.")
    hint: HintKind = Field(
        description="What hints show; canny ones are made of the pictures where the set has no files of them."
    )
    thresholds: tuple[NotNegative, NotNegative] = Field(
        default=(100.0, 200.0), description="Of canny hints: below the first are no edges, above the second are."
    )
    path: Text | None = Field(default=None, description="The folder; see: ortho recipe check --data.")
    batch: Count = Field(default=8, description="Samples a step, over all processes and accumulated parts together.")
    eval_batch: Count | None = Field(default=None, description="Samples a batch in evaluation; null: as in training.")
    workers: Whole = Field(default=0, description="Processes that load data; they do not change the result.")
    size: Count = Field(
        default=512, description="Side of the pictures in pixels; those that are no squares lose their longer ends."
    )
    skip_bad: bool = Field(
        default=False, description="Go on without samples whose line is wrong or files are missing or broken; counted."
    )

    def problems(self) -> Iterator[Rejection]:
        """A set has its own hints, thresholds an order, and only scikit-image brings pictures."""
        known = HINTS.get(self.name, (self.hint,))
        if self.hint not in known:
            yield ("hint",), f"{self.name} has no {self.hint} hints, but {', '.join(known)}"
        if self.thresholds[0] > self.thresholds[1]:
            yield ("thresholds",), f"the first must not be above the second, found {list(self.thresholds)}"
        if self.name == "skimage-hints" and self.path is not None:
            yield ("path",), "skimage-hints comes with scikit-image and has none; remove the line"
        if self.name != "skimage-hints" and self.path is None:
            yield ("name",), f"{self.name} needs path: FOLDER; what it must hold: ortho recipe check --data"
