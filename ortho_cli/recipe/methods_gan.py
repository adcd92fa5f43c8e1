"""The methods about a generator's code: `hessian`, `orojar` and `vp`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ortho_cli.recipe.method_section import Exclude, MethodSection
from ortho_cli.recipe.section import Count, NotNegative, Patterns, Positive

__all__ = ["VP", "Hessian", "OroJaR"]

Targets = Annotated[
    Patterns, Field(min_length=1, description="Patterns of the generator's layers, whose outputs are regularised.")
]
Weight = Annotated[NotNegative, Field(description="Weight of the penalty.")]
Directions = Annotated[int, Field(ge=2, description="Random sign vectors in each step.")]
Step = Annotated[Positive, Field(description="Of the finite differences.")]


class Hessian(MethodSection):
    """A generator whose coordinates act independently: the Hessian penalty (arXiv:2008.10599)."""

    name: Literal["hessian"] = Field(description="The method.")
    targets: Targets
    exclude: Exclude = ()
    penalty: Weight = 1e-5
    directions: Directions = 2
    step: Step = 0.1


class OroJaR(MethodSection):
    """A generator whose coordinates move the picture in orthogonal directions (arXiv:2108.07668)."""

    name: Literal["orojar"] = Field(description="The method.")
    targets: Targets
    exclude: Exclude = ()
    penalty: Weight = 1e-5
    directions: Directions = 2
    step: Step = 0.1


class VP(MethodSection):
    """A generator whose changes tell which coordinate was moved, by a classifier beside it (arXiv:2007.10785)."""

    name: Literal["vp"] = Field(description="The method.")
    penalty: Weight = 1e-5
    width: Count = Field(default=4, description="Channels of the classifier's convolutions.")
