"""Labelled sentences in the `data` section."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ortho_cli.recipe.section import Count, Rejection, Section, Text, Whole

__all__ = ["GLUE", "Docstrings", "Sentences", "TextTable"]

GlueTask = Literal["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte"]


class _Sentences(Section):
    """What all sets of sentences have."""

    kind: ClassVar[str] = "sentences"
    name: str
    batch: Count = Field(default=32, description="Samples a step, over all processes and accumulated parts together.")
    eval_batch: Count | None = Field(default=None, description="Samples a batch in evaluation; null: as in training.")
    workers: Whole = Field(default=0, description="Processes that load data; they do not change the result.")


class GLUE(_Sentences):
    """One of the eight tasks of GLUE (arXiv:1804.07461) that the field reports."""

    name: Literal["glue"] = Field(description="The benchmark.")
    task: GlueTask = Field(description="Which of its tasks.")
    path: Text | None = Field(
        default=None, description="A local folder with train and validation files; it wins over the hub."
    )
    source: Text | None = Field(default=None, description="A hub id other than the usual one: ORG/NAME[@revision].")


class TextTable(_Sentences):
    """Texts, or pairs of them, and their labels, from files or a hub set of one's own."""

    name: Literal["text-table"] = Field(description="A table with columns of text and one of labels.")
    path: Text | None = Field(
        default=None,
        description="A .csv, .tsv, .jsonl, .json or .parquet file, or a folder with one for train and one for "
        "validation (or test); of a single file a fifth is held out.",
    )
    source: Text | None = Field(default=None, description="A hub id: ORG/NAME[@revision].")
    text: Annotated[tuple[Text, ...], Field(min_length=1, max_length=2)] = Field(
        default=("text",), description="The column of texts, or the two of pairs."
    )
    label: Text = Field(default="label", description="The column of classes, or of scores.")
    regression: bool = Field(default=False, description="Labels are scores, not classes.")

    def problems(self) -> Iterator[Rejection]:
        """It comes from somewhere, and nothing is named twice."""
        if self.path is None and self.source is None:
            yield ("name",), "a text-table needs path: FILE (or source: HUB_ID)"
        columns = [*self.text, self.label]
        for key, name in (("text", self.text[-1]), ("label", self.label)):
            if columns.count(name) > 1:
                yield (key,), f"{name} is named {columns.count(name)} times"
                return


class Docstrings(_Sentences):
    """What functions and classes of SciPy say of themselves, by the part of SciPy they are in; no download."""

    name: Literal["docstrings"] = Field(description="First paragraphs of docstrings, read from SciPy's own files.")
    judge: Literal["val", "test"] = Field(
        default="test", description="The part that evaluation is on: val to choose settings by, test to report."
    )


Sentences = GLUE | TextTable | Docstrings
