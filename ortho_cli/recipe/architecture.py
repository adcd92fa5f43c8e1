"""What every section of `model` has."""

from __future__ import annotations

from typing import ClassVar

from ortho_cli.recipe.section import Section

__all__ = ["Architecture"]


class Architecture(Section):
    """What the `model` section names."""

    is_its_base: ClassVar[bool] = False
    """Whether the builder reads `model.base` itself, because the architecture is the base's."""
