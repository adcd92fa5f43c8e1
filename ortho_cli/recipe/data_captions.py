"""The `data` section of text-to-image training: pictures, and what they show in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from ortho_cli.recipe.section import Count, Rejection, Section, Share, Text, Whole

__all__ = ["CaptionedPictures"]


class CaptionedPictures(Section):
    """Captioned pictures: a folder, a set of the hub, or those of scikit-image."""

    kind: ClassVar[str] = "captioned pictures"
    name: Literal["caption-folder", "caption-hub", "nouns", "skimage-captions"] = Field(
        description="The data set; nouns is drawn and in the public domain, that of scikit-image needs no download."
    )
    path: Text | None = Field(
        default=None,
        description="A folder of pictures with metadata.jsonl, with a .txt beside each, or of kohya's folders; see: "
        "ortho recipe check --data.",
    )
    source: Text | None = Field(default=None, description="A hub id, ORG/NAME[@revision].")
    caption_column: Text | None = Field(
        default=None, description="Of a hub set; null: text, caption, captions or prompt, whichever it has."
    )
    batch: Count = Field(default=4, description="Samples a step, over all processes and accumulated parts together.")
    eval_batch: Count | None = Field(default=None, description="Samples a batch in evaluation; null: as in training.")
    workers: Whole = Field(default=0, description="Processes that load data; they do not change the result.")
    size: Count = Field(default=512, description="Side of the pictures in pixels; of buckets, of a square as large.")
    buckets: Count | None = Field(
        default=None,
        description="Keep shapes: sides are multiples of this, each batch has one shape; null: all are cut to squares.",
    )
    crop: Literal["center", "random"] = Field(default="center", description="Which part of a picture is seen.")
    flip: bool = Field(default=False, description="Mirror every other picture of an epoch.")
    caption_dropout: Share = Field(
        default=0.0, description="Share of samples that are trained without words, which guidance builds on."
    )
    caption_shuffle: bool = Field(default=False, description="Bring the parts between commas into another order.")
    caption_keep: Whole = Field(default=0, description="Parts at the beginning that shuffling leaves in place.")
    held_out: Share = Field(
        default=0.05, description="Share of the pictures to judge by, where none are set apart; 0: judge nothing."
    )
    cache: Text | None = Field(
        default=None, description="A folder that keeps latents and text embeddings from epoch to epoch; null: none."
    )
    skip_bad: bool = Field(
        default=False, description="Go on without samples that are missing, broken or without a caption; counted."
    )

    def problems(self) -> Iterator[Rejection]:
        """Each set has one source; latents are kept of pictures that are cut the same way every time."""
        wanted = {"caption-folder": "path", "caption-hub": "source"}.get(self.name)
        for key in ("path", "source"):
            if key == wanted and getattr(self, key) is None:
                yield (key,), f"{self.name} needs {key}: {'FOLDER' if key == 'path' else 'ORG/NAME'}"
            elif key != wanted and getattr(self, key) is not None:
                yield (key,), f"{self.name} has none; remove the line"
        if self.caption_column is not None and self.name not in ("caption-hub", "nouns"):
            yield ("caption_column",), "is for sets of the hub"
        if self.caption_keep and not self.caption_shuffle:
            yield ("caption_keep",), "has no effect without caption_shuffle: true"
        if self.cache is not None and self.crop == "random":
            yield ("cache",), "keeps latents, and random crops have others every time; write crop: center"
