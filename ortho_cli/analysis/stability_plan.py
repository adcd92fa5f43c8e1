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
from ortho_cli.errors import TargetError, UsageError

from .attention_pieces import AttentionPieces
from .stability import Pair, has_both, measure_series, plan_pairs
from .stability_cache import ResultCache
from .stability_change import Change

__all__ = ["StabilityPlan", "plan_stability"]

WITHIN = ("first", "last")  # references that are of the series
SHOWN = 3  # layers that a note names


@dataclass(frozen=True)
class StabilityPlan:
    """A series, its layers, and what is compared with what.

    Attributes:
        entries: the checkpoints, and after them a reference beside the series.
        layers: which are measured.
        pairs: places in `entries`.
        pieces: how attention layers are split.
        top_rank: leading directions that are compared alone; None: none.
        notes: of layers that are left out, or that not every checkpoint has.
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

        def options(layer: SeriesLayer) -> object:
            return [*self.pieces.split(layer), self.top_rank]

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
        TargetError: a pattern that matches nothing, or layers that no two compared checkpoints share.
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
    conv1d = any(has_conv1d(entry.checkpoint) for entry in entries)
    pieces = AttentionPieces(split_heads, split_qkv, selection.shapes, conv1d)
    pieces.check(selection.layers)
    notes = [*selection.notes, *_incomplete(selection.layers, pairs, len(entries))]
    return StabilityPlan(tuple(entries), selection.layers, tuple(pairs), pieces, top_rank, tuple(notes))


def _incomplete(layers: Sequence[SeriesLayer], pairs: Sequence[Pair], count: int) -> list[str]:
    """Notes on layers that some of the checkpoints lack.

    Raises:
        TargetError: there is nothing to compare.
    """
    lone = [layer for layer in layers if not any(has_both(layer, pair) for pair in pairs)]
    if len(lone) == len(layers):
        raise TargetError(
            f"nothing to compare: none of {len(layers)} layers is in both checkpoints of a comparison",
            hint="name checkpoints of one training",
        )
    partial = [layer for layer in layers if None in layer.stored and layer not in lone]
    return [
        f"{_shown(found)} {what}"
        for found, what in (
            (lone, "not measured: in no two checkpoints that are compared"),
            (partial, f"measured where found: not in all {count} checkpoints"),
        )
        if found
    ]


def _shown(layers: Sequence[SeriesLayer]) -> str:
    names = ", ".join(layer.name for layer in layers[:SHOWN])
    more = f" and {len(layers) - SHOWN} more" if len(layers) > SHOWN else ""
    return f"{names}{more} {'is' if len(layers) == 1 else 'are'}"
