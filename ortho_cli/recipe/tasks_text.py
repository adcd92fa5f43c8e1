"""Tasks of language in the `task` section."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ortho_cli.recipe.section import Count, Section

__all__ = ["Glue"]


class Glue(Section):
    """Sentences, or pairs of them, into classes or a score, judged as GLUE judges."""

    kind: ClassVar[str] = "sentences"
    model_kind: ClassVar[str] = "sentences"
    name: Literal["glue"] = Field(description="What is trained.")
    max_length: Count = Field(default=128, description="Tokens a sample at most; longer ones are cut at their end.")
    pad: Literal["batch", "max_length"] = Field(
        default="batch", description="Fill up to a batch's longest sample, or always to max_length."
    )
    compat: Literal["frozen-head"] | None = Field(
        default=None, description="frozen-head: HRA's published runs train no head; it stays as it was drawn."
    )
