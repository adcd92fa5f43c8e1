"""The schema of the recipes for `ortho analyze`: `verb: analyze-spectrum` is `ortho analyze spectrum`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from ortho_cli.recipe.section import Count, Positive, Rejection, Text, VerbRecipe

__all__ = ["ANALYSES", "AnalyzeAdapter", "AnalyzeOrthogonality", "AnalyzeSpectrum", "AnalyzeStability"]

Format = Literal["html", "png", "svg", "pdf", "csv", "json"]
Formats = Annotated[list[Format], Field(min_length=1, description="What the report is written as.")]
Checkpoint = Annotated[Text, Field(description="The checkpoint to measure: a file, a folder or a hub id.")]
Folder = Annotated[Text, Field(description="The folder to write the report to.")]
Targets = Annotated[list[Text] | None, Field(description="Patterns or presets of layers; null: every layer.")]
Exclude = Annotated[list[Text], Field(description="Patterns of layers to leave out.")]
FailAbove = Annotated[float | None, Field(description="Exit 5 where a layer's metric is above.")]
FailBelow = Annotated[float | None, Field(description="Exit 5 where a layer's metric is below.")]


class AnalyzeSpectrum(VerbRecipe):
    """Measure how the layers of a checkpoint use their rank."""

    verb: Literal["analyze-spectrum"]
    checkpoint: Checkpoint
    output: Folder = "spectrum-report"
    targets: Targets = None
    exclude: Exclude = Field(default=[])
    format: Formats = Field(default=["html", "png", "csv"])


class AnalyzeOrthogonality(VerbRecipe):
    """Measure how far the layers of a checkpoint are from orthogonal."""

    verb: Literal["analyze-orthogonality"]
    checkpoint: Checkpoint
    output: Folder = "orthogonality-report"
    groups: Count = Field(default=32, description="The most groups of filters, as for gor.")
    targets: Targets = None
    exclude: Exclude = Field(default=[])
    metric: Literal[
        "scale_free", "normalized", "residual", "coherence", "inter", "intra", "inter_scale_free", "intra_scale_free"
    ] = Field(default="scale_free", description="What orders the table and limits hold to.")
    fail_above: FailAbove = None
    fail_below: FailBelow = None
    format: Formats = Field(default=["html", "png", "csv"])

    def problems(self) -> Iterator[Rejection]:
        """Limits with something between them."""
        yield from _limits(self.fail_above, self.fail_below)


class AnalyzeAdapter(VerbRecipe):
    """Measure what an adapter does to each weight of its base."""

    verb: Literal["analyze-adapter"]
    base: Text = Field(description="The checkpoint that the adapter acts on.")
    adapter: Text = Field(description="HRA, LoRA, OFT, ...: a file, a folder or a hub id.")
    output: Folder = "adapter-report"
    targets: Targets = None
    top: Count = Field(default=10, description="Leading singular vectors to look for new directions among.")
    threshold: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.5, description="Below this best |cos| a direction is new."
    )
    metric: Literal[
        "relative_change",
        "effective_rank",
        "angle_max",
        "angle_mean",
        "defect",
        "intruders_output",
        "intruders_input",
        "closest_output",
        "closest_input",
    ] = Field(default="relative_change", description="What orders the table and limits hold to.")
    fail_above: FailAbove = None
    fail_below: FailBelow = None
    format: Formats = Field(default=["html", "png", "csv"])

    def problems(self) -> Iterator[Rejection]:
        """Limits with something between them."""
        yield from _limits(self.fail_above, self.fail_below)


class AnalyzeStability(VerbRecipe):
    """Measure when the basis of each layer has settled."""

    verb: Literal["analyze-stability"]
    series: Annotated[list[Text], Field(min_length=1)] = Field(
        description="Checkpoints of one training, what holds them, or an earlier stability.csv."
    )
    output: Folder = "stability-report"
    revisions: Text | None = Field(default=None, description="A glob over the revisions of one repository on the hub.")
    lag: Annotated[list[Count], Field(min_length=1)] | None = Field(
        default=None, description="Compare with the checkpoints so many before; null: [1], or the reference."
    )
    reference: Text | None = Field(
        default=None, description="Compare all with one checkpoint instead: first, last, or its path."
    )
    top_rank: Count | None = Field(default=None, description="Also compare so many leading directions alone.")
    threshold: Annotated[Positive, Field(le=1)] = Field(default=0.95, description="The stability that is settled.")
    patience: Count = Field(default=2, description="Comparisons in a row that must reach it.")
    targets: list[Text] | None = Field(
        default=None, description="Patterns or presets; null: all but embeddings, position tables and single rows."
    )
    exclude: Exclude = Field(default=[])
    split_qkv: bool = Field(default=False, description="Query, key and value of a fused projection apart.")
    split_heads: Count | None = Field(default=None, description="Attention by head: so many a layer.")
    fail_below: FailBelow = None
    fail_above: FailAbove = None
    device: Text = Field(default="cpu", description="Where to compute, e.g. cuda.")
    format: Formats = Field(default=["html", "png", "svg", "csv", "json"])

    def problems(self) -> Iterator[Rejection]:
        """One thing to compare with, and limits with something between them."""
        if self.lag is not None and self.reference is not None:
            yield ("reference",), "lag is given too, and they exclude each other"
        yield from _limits(self.fail_above, self.fail_below)


def _limits(above: float | None, below: float | None) -> Iterator[Rejection]:
    if above is not None and below is not None and below > above:
        yield ("fail_below",), f"nothing is between {below:g} and fail_above, {above:g}"


ANALYSES: dict[str, type[VerbRecipe]] = {
    "analyze-stability": AnalyzeStability,
    "analyze-orthogonality": AnalyzeOrthogonality,
    "analyze-adapter": AnalyzeAdapter,
    "analyze-spectrum": AnalyzeSpectrum,
}
