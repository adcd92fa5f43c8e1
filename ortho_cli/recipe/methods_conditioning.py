"""The methods about the covariance of activations: `whiten`, which equalises it, and `track_conditioning`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ortho_cli.recipe.method_section import Exclude, MethodSection
from ortho_cli.recipe.section import Count, NotNegative, Patterns, Positive

__all__ = ["TrackConditioning", "Whiten"]


class Whiten(MethodSection):
    """Batch normalisation that also decorrelates channels, in place of chosen norms (ZCA; arXiv:1804.08450)."""

    once: ClassVar[bool] = False  # norms of other widths may want other groups

    name: Literal["whiten"] = Field(description="The method.")
    targets: Annotated[
        Literal["auto"] | Annotated[Patterns, Field(min_length=1)],
        Field(description="Patterns of names of batch or group norms; auto: the first one, as in arXiv:2207.02119."),
    ] = "auto"
    exclude: Exclude = ()
    groups: Count = Field(default=1, description="Groups of consecutive channels, each whitened by itself.")
    ridge: Positive = Field(default=1e-2, description="Added to the covariance's eigenvalues; bounds the gain.")
    momentum: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.1, description="Share of a batch in the running statistics, which evaluation uses."
    )
    solver: Literal["eigh", "newton-schulz", "mpa"] = Field(
        default="eigh", description="The inverse root: exact, by products alone, or the published approximation."
    )
    compat: Literal["paper"] | None = Field(
        default=None,
        description="paper: its code averages whitening matrices, not covariances, and draws new weights from U(0, 1).",
    )


class TrackConditioning(MethodSection):
    """Log how well conditioned the covariance of chosen layers' channels is, while any run trains."""

    name: Literal["track_conditioning"] = Field(description="The method.")
    targets: Annotated[
        Literal["auto"] | Annotated[Patterns, Field(min_length=1)],
        Field(description="Patterns of layer names; auto: whitening layers, or else the first norm."),
    ] = "auto"
    exclude: Exclude = ()
    every: Count = Field(default=10, description="Steps between measurements; the first step is measured too.")
    of: Literal["auto", "input", "output"] = Field(
        default="auto", description="Which side of a layer; auto: what goes into a norm, what comes out of others."
    )
    ridge: NotNegative | None = Field(
        default=None, description="Added before the condition is taken; null: a whitening layer's own, else 0."
    )
