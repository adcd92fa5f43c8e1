"""What every section of a recipe is: strict, frozen, closed to unknown keys; and the types that several sections share.

Rules between the keys of a section are its `problems()`. They only reject, never repair, and each names the key it is
about, so that the error carries that key's line.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError
from typing_extensions import Self

from ortho_cli.recipe.parse import Location

__all__ = [
    "VERSION", "Count", "NotNegative", "Patterns", "Positive", "Rejection", "Section", "Share", "Text", "VerbRecipe",
    "Version", "Whole",
]  # fmt: skip

VERSION = 1

Rejection = tuple[Location, str]
"""Where in a section something is wrong, and the reason."""


def _known_version(version: int) -> int:
    if version != VERSION:
        raise ValueError(f"version {version} is not known; this ortho reads version {VERSION}")
    return version


Text = Annotated[str, Field(min_length=1)]
Patterns = tuple[Text, ...]
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
# Not Literal[1]: that takes `true` and `1.0` for 1, strict or not.
Version = Annotated[
    int,
    AfterValidator(_known_version),
    Field(description="Version of this format.", json_schema_extra={"const": VERSION}),
]


class Section(BaseModel):
    """A part of a recipe. Numbers are finite, lists are tuples, and there are no keys but the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def problems(self) -> Iterator[Rejection]:
        """What the types alone do not say; asked only once every key is right by itself."""
        return iter(())

    @model_validator(mode="after")
    def _reject(self) -> Self:
        errors = [
            InitErrorDetails(type=PydanticCustomError("value_error", "{error}", {"error": reason}), loc=loc, input=None)
            for loc, reason in self.problems()
        ]
        if errors:
            raise ValidationError.from_exception_data(type(self).__name__, errors)
        return self


class VerbRecipe(Section):
    """What every verb's recipe has."""

    version: Version
    verb: str
