"""How far the basis of each layer moves over a series of checkpoints: one decomposition a layer and checkpoint.

A job is a layer: it goes through the series once, keeps the bases that later checkpoints are compared with, and lets
them go. Layers run in parallel on one thread each (`LayerPool`), so that memory stays that of a few layers and the time
is linear in the checkpoints, whatever the number of lags.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import Tensor

from ortho_cli.checkpoints.layer_pool import LayerPool
from ortho_cli.checkpoints.series import Entry
from ortho_cli.checkpoints.series_layers import SeriesLayer, read_flat
from ortho_cli.checkpoints.tensors import TORCH_DTYPES
from ortho_cli.errors import NumericsError, UsageError
from ortho_cli.linalg.ranks import energy_rank
from ortho_cli.linalg.subspace import (
    Basis,
    basis,
    factor_stability,
    mixing_similarity,
    noise_floor,
    r_distance,
    subspace_overlap,
    truncated_stability,
)

from .stability_cache import ResultCache
from .stability_change import Change

__all__ = ["Pair", "Pieces", "has_both", "measure_series", "plan_pairs", "whole_layer"]

Pieces = Callable[[SeriesLayer, Tensor], "list[tuple[str, Tensor]]"]
"""The matrices of a layer that are measured on their own, by name."""


class Pair(NamedTuple):
    """Places in a series: a checkpoint, and the one it is compared with."""

    current: int
    reference: int
    lag: int | None


def plan_pairs(count: int, *, lags: Sequence[int] = (1,), reference: str | None = None) -> list[Pair]:
    """Which checkpoints of a series are compared.

    Args:
        count: checkpoints.
        lags: compare each with the one so many before it; several in one pass.
        reference: compare each with the `first` or the `last` instead, or with one beside the series, at place `count`.

    Raises:
        UsageError: nothing to compare.

    >>> plan_pairs(3, reference="first")
    [Pair(current=1, reference=0, lag=1), Pair(current=2, reference=0, lag=2)]
    """
    if reference is None:
        wrong = [lag for lag in lags if not 1 <= lag < count]
        if wrong:
            raise UsageError(f"--lag {wrong[0]}: a series of {count} checkpoints has lags from 1 to {count - 1}")
        return sorted(Pair(place, place - lag, lag) for lag in dict.fromkeys(lags) for place in range(lag, count))
    if reference == "beside":
        return [Pair(place, count, None) for place in range(count)]
    fixed = 0 if reference == "first" else count - 1
    pairs = [Pair(place, fixed, place - fixed) for place in range(count) if place != fixed]
    if not pairs:
        raise UsageError(f"a series has at least two checkpoints, found {count}")
    return pairs


def whole_layer(layer: SeriesLayer, matrix: Tensor) -> list[tuple[str, Tensor]]:
    """A layer as one matrix."""
    return [(layer.name, matrix)]


def measure_series(
    entries: Sequence[Entry],
    layers: Sequence[SeriesLayer],
    pairs: Sequence[Pair],
    *,
    pieces: Pieces = whole_layer,
    top_rank: int | None = None,
    workers: int = 1,
    device: str = "cpu",
    cache: ResultCache | None = None,
    start: Callable[[int], None] = lambda total: None,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Change]:
    """Measure every layer of a series.

    Args:
        entries: the checkpoints, and after them a reference that is not of the series.
        layers: which.
        pairs: which checkpoints are compared.
        pieces: how a layer is split; whole by default.
        top_rank: also compare the leading directions alone, so many of them.
        workers: layers at a time; the values do not depend on it.
        device: where to compute.
        cache: of results by file and tensor; what it holds is not computed again.
        start: told of the bytes to read, once.
        advance: told of the bytes of each layer that is done.

    Returns:
        By layer, then checkpoint. A checkpoint that lacks a layer is passed over.

    Raises:
        NumericsError: a weight that is not finite.

    Cost: a layer and checkpoint `4 m n k + 12 k^3` flops in float64, `k = min(m, n)`; a pair `2 m n + 2 k^3`.
    """
    due = {layer.name: [pair for pair in pairs if has_both(layer, pair)] for layer in layers}
    found: dict[str, dict[Pair, list[Change]]] = {layer.name: {} for layer in layers}
    if cache is not None:
        for layer in layers:
            known = cache.get(layer, entries, due[layer.name])
            found[layer.name] = {pair: [_dated(each, entries, pair) for each in known[pair]] for pair in known}
            due[layer.name] = [pair for pair in due[layer.name] if pair not in known]
    by_name = {layer.name: layer for layer in layers}

    def compute(name: str) -> dict[Pair, list[Change]]:
        with torch.inference_mode():  # per thread
            return _measure_layer(by_name[name], entries, due[name], pieces, top_rank, device)

    wanted = [layer for layer in layers if due[layer.name]]
    sizes = {layer.name: _bytes_read(layer, due[layer.name]) for layer in wanted}
    start(sum(sizes.values()))
    pool = LayerPool(compute, workers=workers)
    costs = {layer.name: _bytes_held(layer, due[layer.name]) for layer in wanted}
    for layer, result in zip(wanted, pool.map(costs), strict=True):
        found[layer.name] |= result
        if cache is not None:
            cache.put(layer, entries, {pair: [asdict(change) for change in result[pair]] for pair in result})
        advance(sizes[layer.name])
    return [change for layer in layers for change in _by_piece(found[layer.name])]


def _measure_layer(
    layer: SeriesLayer,
    entries: Sequence[Entry],
    pairs: Sequence[Pair],
    pieces: Pieces,
    top_rank: int | None,
    device: str,
) -> dict[Pair, list[Change]]:
    """All pairs of one layer, each checkpoint decomposed once."""
    last = {place: number for number, pair in enumerate(pairs) for place in (pair.current, pair.reference)}
    held: dict[int, dict[str, Basis]] = {}
    found = {}
    for number, pair in enumerate(pairs):
        for place in (pair.reference, pair.current):
            if place not in held:
                weight, entry = read_flat(layer, place, entries[place]), entries[place]
                stored = _precision(layer, place)
                held[place] = {
                    name: _basis(name, piece.to(device), stored, entry) for name, piece in pieces(layer, weight)
                }
        found[pair] = [
            _change(name, layer.kind, held[pair.reference][name], now, top_rank, entries, pair)
            for name, now in held[pair.current].items()
        ]
        for place in [place for place in held if last[place] <= number]:
            del held[place]
    return found


def _precision(layer: SeriesLayer, place: int) -> torch.dtype:
    """The type whose rounding a layer has in one checkpoint."""
    stored = layer.stored[place]
    assert stored is not None, "this checkpoint lacks the layer"
    found = getattr(torch, TORCH_DTYPES[stored.dtype])
    assert isinstance(found, torch.dtype)
    return found


def _basis(name: str, matrix: Tensor, stored: torch.dtype, entry: Entry) -> Basis:
    try:
        return basis(matrix, stored=stored)
    except NumericsError as error:
        raise NumericsError(
            f"layer {name} of {entry.name} holds values that are not finite", hint=error.hint
        ) from error


def _change(
    name: str, kind: str, before: Basis, now: Basis, top_rank: int | None, entries: Sequence[Entry], pair: Pair
) -> Change:
    rows, cols = now.factor.shape
    triangles = r_distance(before, now)
    change = Change(
        name, kind, 0, None, pair.lag, rows, cols, factor_stability(before.factor, now.factor), noise_floor(rows, cols),
        float(now.values[-1]), float(now.values[0]), triangles.distance, triangles.similarity,
        mixing_similarity(before, now), energy_rank(now.values, 0.9), energy_rank(now.values, 0.99),
        None if top_rank is None else truncated_stability(before, now, top_rank),
        None if top_rank is None else subspace_overlap(before, now, top_rank), now.rank, before.rank,
    )  # fmt: skip
    return _dated(asdict(change), entries, pair)


def _dated(values: Mapping[str, object], entries: Sequence[Entry], pair: Pair) -> Change:
    """The numbers of a pair, with the steps that the series gives its checkpoints now."""
    step = entries[pair.current].step
    assert step is not None, "a checkpoint of a series has a step"
    dates = {"step": step, "reference_step": entries[pair.reference].step, "lag": pair.lag}
    return Change(**{**values, **dates})  # type: ignore[arg-type]


def has_both(layer: SeriesLayer, pair: Pair) -> bool:
    """Whether both checkpoints of a comparison have a layer."""
    return layer.stored[pair.current] is not None and layer.stored[pair.reference] is not None


def _bytes_read(layer: SeriesLayer, pairs: Iterable[Pair]) -> int:
    places = {place for pair in pairs for place in (pair.current, pair.reference)}
    return sum(stored.nbytes for place in places if (stored := layer.stored[place]) is not None)


def _bytes_held(layer: SeriesLayer, pairs: Sequence[Pair]) -> int:
    """What a job needs at most: the bases it keeps, and one decomposition under way."""
    last = {place: number for number, pair in enumerate(pairs) for place in (pair.current, pair.reference)}
    held: set[int] = set()
    most = 0
    for number, pair in enumerate(pairs):
        held |= {pair.current, pair.reference}
        most = max(most, len(held))
        held = {place for place in held if last[place] > number}
    rows, cols = layer.flat_shape
    side = min(rows, cols)
    return most * 4 * (rows * cols + 2 * side**2) + 8 * rows * cols + 48 * side**2


def _by_piece(found: Mapping[Pair, Sequence[Change]]) -> list[Change]:
    """One piece of a layer after the other, each in the order of its checkpoints."""
    changes = [change for pair in sorted(found) for change in found[pair]]
    order = {name: place for place, name in enumerate(dict.fromkeys(change.layer for change in changes))}
    return sorted(changes, key=lambda change: order[change.layer])
