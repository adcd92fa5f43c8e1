"""What every section of `methods` has, and the keys that several share."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ortho_cli.recipe.section import Patterns, Positive, Section

__all__ = ["AutoTargets", "Exclude", "MethodSection", "OwnRate"]

AutoTargets = Annotated[
    Literal["auto"] | Annotated[Patterns, Field(min_length=1)],
    Field(description="Patterns of layer names or a preset's name; auto: by the architecture."),
]
Exclude = Annotated[Patterns, Field(description="Patterns of layers to leave alone.")]
OwnRate = Annotated[
    Positive | None, Field(description="A learning rate of its own at the peak; null: the optimizer's.")
]


class MethodSection(Section):
    """What every method has."""

    name: str
    once: ClassVar[bool] = True
    """Whether a recipe may hold only one of its name."""
