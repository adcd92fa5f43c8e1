"""What `ortho analyze stability` is going to measure: opened checkpoints, layers, comparisons; no weight is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from ortho_cli.checkpoints.hub_series import open_revisions
from ortho_cli.checkpoints.matrices import has_conv1d
from ortho_cli.checkpoints.series import Entry, open_entry, open_series
from ortho_cli.checkpoints.series_layers import SeriesLayer, series_layers
from ortho_cli.errors import UsageError

from .attention_pieces import AttentionPieces
from .stability import Pair, measure_series, plan_pairs
from .stability_cache import ResultCache
from .stability_change import Change

__all__ = ["StabilityPlan", "plan_stability"]

WITHIN = ("first", "last")  # references that are of the series


@dataclass(frozen=True)
class StabilityPlan:
    """A series, its layers, and what is compared with what.

    Attributes:
        entries: the checkpoints, and after them a reference beside the series.
        layers: which are measured.
        pairs: places in `entries`.
        pieces: how attention layers are split.
        top_rank: leading directions that are compared alone; None: none.
        notes: of layers that are left out.
    """

    entries: tuple[Entry, ...]
    layers: tuple[SeriesLayer, ...]
    pairs: tuple[Pair, ...]
    pieces: AttentionPieces
    top_rank: int | None
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that are read."""
        return sum(stored.nbytes for layer in self.layers for stored in layer.stored if stored is not None)

    def measure(
        self,
        *,
        workers: int = 1,
        device: str = "cpu",
        cache: Path | None = None,
        start: Callable[[int], None] = lambda total: None,
        advance: Callable[[int], None] = lambda count: None,
    ) -> list[Change]:
        """Measure everything; `cache` is a folder of earlier results, the rest as for `measure_series`."""
        options = {"heads": self.pieces.heads, "qkv": self.pieces.qkv, "top_rank": self.top_rank}
        with nullcontext(None) if cache is None else ResultCache(cache, options) as results:
            return measure_series(
                self.entries, self.layers, self.pairs, pieces=self.pieces, top_rank=self.top_rank, workers=workers,
                device=device, cache=results, start=start, advance=advance,
            )  # fmt: skip


def plan_stability(
    sources: Sequence[str],
    *,
    revisions: str | None = None,
    lags: Sequence[int] = (),
    reference: str | None = None,
    targets: Sequence[str] = (),
    exclude: Sequence[str] = (),
    split_qkv: bool = False,
    split_heads: int | None = None,
    top_rank: int | None = None,
) -> StabilityPlan:
    """Open a series, and choose what is compared with what.

    Args:
        sources: checkpoints, a run, folders, globs, or a repository with `revisions`.
        revisions: a glob over the branches and tags of one repository on the hub.
        lags: compare with the checkpoint so many before; none: 1.
        reference: `first`, `last`, or a checkpoint that all are compared with instead.
        targets: globs or presets of layers.
        exclude: globs of layers to leave out.
        split_qkv: fused projections apart.
        split_heads: heads apart, so many a layer.
        top_rank: also compare the leading directions alone.

    Raises:
        UsageError: options that contradict each other, or a series that is too short.
        CheckpointError: a checkpoint that cannot be read.
        TargetError: a pattern that matches nothing.
    """
    if reference is not None and lags:
        raise UsageError("--lag and --reference exclude each other", hint="a reference is the same for all checkpoints")
    if revisions is not None and len(sources) != 1:
        raise UsageError(f"--revisions asks for one repository, found {len(sources)} arguments")
    entries = open_series(sources) if revisions is None else open_revisions(sources[0], revisions)
    beside = reference is not None and reference not in WITHIN
    if len(entries) < 2 and not beside:
        raise UsageError(
            f"a series has at least two checkpoints, found {len(entries)}",
            hint="name more of them, or the folder that holds them",
        )
    pairs = plan_pairs(len(entries), lags=lags or (1,), reference="beside" if beside else reference)
    if beside:
        entries = [*entries, open_entry(str(reference))]
    selection = series_layers(entries, targets, exclude)
    shapes = {layer.name: layer.flat_shape for layer in selection.layers}
    pieces = AttentionPieces(split_heads, split_qkv, shapes, has_conv1d(entries[0].checkpoint))
    pieces.check(selection.layers)
    return StabilityPlan(tuple(entries), selection.layers, tuple(pairs), pieces, top_rank, selection.notes)
