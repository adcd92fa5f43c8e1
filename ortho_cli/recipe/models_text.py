"""Models of sentences in the `model` section."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ortho_cli.recipe.architecture import Architecture
from ortho_cli.recipe.section import Text

__all__ = ["HFText"]


class HFText(Architecture):
    """Any text classifier of transformers (AutoModelForSequenceClassification), with a head for the task."""

    kind: ClassVar[str] = "sentences"
    is_its_base: ClassVar[bool] = True
    name: Literal["hf-text"] = Field(description="The architecture is the base's.")
    base: Text = Field(description="A transformers folder or hub id.")
    tokenizer: Text | None = Field(
        default=None, description="A folder or hub id with the tokenizer; null: it is beside the base."
    )
