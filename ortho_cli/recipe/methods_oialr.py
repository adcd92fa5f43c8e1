"""The methods that watch bases settle: `oialr`, and `track_stability`, which only records."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from ortho_cli.recipe.method_section import MethodSection
from ortho_cli.recipe.section import Count, Patterns, Rejection, Whole

__all__ = ["OIALR", "TrackStability"]


class OIALR(MethodSection):
    """Freeze bases that have settled, train low-rank cores (OIALR, arXiv:2401.08505)."""

    name: Literal["oialr"] = Field(description="The method.")
    targets: Annotated[
        Literal["auto"] | Annotated[Patterns, Field(min_length=1)],
        Field(description="Patterns of layer names; auto: linear layers, convolutions, attention, unless thin."),
    ] = "auto"
    when: Literal["stable", "step"] = Field(
        default="stable", description="A layer converts when its measured basis is stable; or all after delay steps."
    )
    every: Count = Field(default=200, description="Steps between checks, which measure, convert and cut.")
    threshold: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.95, description="Stability, from one check to the next, from which on a basis has settled."
    )
    patience: Count = Field(default=2, description="Checks in a row that must reach the threshold.")
    start_after: Whole = Field(default=0, description="Steps before the first check of when: stable.")
    delay: Whole = Field(default=1000, description="Steps at full rank of when: step; 0 converts at the start.")
    cut: Literal["relative", "energy", "budget"] = Field(default="relative", description="What beta means: see there.")
    beta: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.1,
        description="relative: singular values below this share of the largest go, at most half a check; energy: the "
        "relative error that all cuts of a layer may make; budget: the share of the layers' entries that may train.",
    )
    keep_first: bool = Field(default=False, description="The network's first layer stays dense.")
    keep_last: bool = Field(default=True, description="The network's last layer, its head, stays dense.")
    order: Literal["back", "all"] = Field(
        default="back", description="Each check takes a further share of the layers in, from the back; or all at once."
    )
    share: Annotated[float, Field(gt=0, le=1)] = Field(default=0.1, description="That share.")
    moments: Literal["rotate", "zero"] = Field(
        default="rotate", description="What the optimizer knows of a weight follows its basis, or begins anew."
    )
    lora_rank: Count | None = Field(
        default=None, description="Leave a LoRA against model.base too, of this rank; what it leaves out is said."
    )
    lora_energy: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="Or of the ranks that hold this share of each layer's change (in squares)."
    )

    def problems(self) -> Iterator[Rejection]:
        """One rule for the LoRA's rank."""
        if self.lora_rank is not None and self.lora_energy is not None:
            yield ("lora_energy",), "is another rule for the same rank as lora_rank; give one of them"


class TrackStability(MethodSection):
    """Record how far the bases of layers move, for `ortho analyze stability`, without keeping checkpoints."""

    name: Literal["track_stability"] = Field(description="The method.")
    every: Count = Field(default=200, description="Steps between checks.")
    lag: Count = Field(default=1, description="Checks between the two bases that are compared.")
    targets: Annotated[
        Literal["auto"] | Annotated[Patterns, Field(min_length=1)],
        Field(description="Patterns of layer names; auto: all linear layers and convolutions."),
    ] = "auto"
