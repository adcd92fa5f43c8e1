"""One value a layer as a picture: kinds of layer down, blocks across, where names are built so; else a bar each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .figure import Bars, Figure, Heatmap

__all__ = ["layer_map", "split_name"]

MAX_KINDS, MAX_BLOCKS = 40, 60  # rows and columns that can be told apart
LABEL_ROOM = 60  # characters below a heatmap
LEAST_FILL = 0.25  # share of the cells that should hold a value
MAX_BARS = 40

Grid = dict[str, tuple[str, str]]


def split_name(layer: str, depth: int = 1) -> tuple[str, str]:
    """The block that a layer stands in, and what it is there.

    Args:
        layer: dotted name.
        depth: how many of its numbers belong to the block; one at the very end is the layer's own (`to_out.0`).

    >>> split_name("encoder.layer.3.attention.self.query"), split_name("pooler.dense")
    (('encoder.layer.3', 'attention.self.query'), ('', 'pooler.dense'))
    """
    parts = layer.split(".")
    numbers = [place for place, part in enumerate(parts[:-1]) if part.isdigit()][:depth]
    cut = numbers[-1] + 1 if numbers else 0
    return ".".join(parts[:cut]), ".".join(parts[cut:])


def layer_map(
    name: str,
    title: str,
    values: Mapping[str, float | None],
    *,
    label: str,
    low: float | None = None,
    high: float | None = None,
    note: str = "",
) -> Figure:
    """Draw one number for each layer.

    Args:
        name: of the figure's files.
        title: above it.
        values: layer -> number; None and what is not finite leaves a gap.
        label: what the number is.
        low: of the first colour; None: the smallest value.
        high: of the last colour; None: the largest.
        note: below it.

    Returns:
        A heatmap of kinds and blocks where the names have that order, else bars (of the largest `MAX_BARS` values).
    """
    grid = _grid(list(values))
    if grid is None:
        known = {layer: value for layer, value in values.items() if value is not None and math.isfinite(value)}
        bars = dict(sorted(known.items(), key=lambda item: -item[1])[:MAX_BARS])
        more = f" The {MAX_BARS} largest of {len(known)} layers." if len(known) > MAX_BARS else ""
        return Bars(name, title, tuple(bars), tuple(bars.values()), value_label=label, note=(note + more).strip())
    cells = {place: _finite(values[layer]) for layer, place in grid.items()}
    blocks, kinds = _sides(grid)
    rows = tuple(tuple(cells.get((block, kind)) for block in blocks) for kind in kinds)
    columns, x_label = _column_labels(blocks)
    return Heatmap(
        name, title, kinds, columns, rows, x_label=x_label, value_label=label, low=low, high=high, note=note
    )  # fmt: skip


def _column_labels(blocks: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """Names that fit below columns, and what they leave out: `i4.1` for `model.input_blocks.4.1`."""
    prefix = _common_prefix([block for block in blocks if block])
    names = [block.removeprefix(prefix) for block in blocks]
    words = sorted({part for name in names for part in name.split(".") if part and not part.isdigit()})
    if sum(map(len, names)) > LABEL_ROOM:
        starts = {word: _start(word, words) for word in words}
        legend = ", ".join(f"{start} = {word}" for word, start in starts.items())
        return tuple(_short(name, starts) for name in names), legend
    return tuple(name or "(top)" for name in names), prefix.rstrip(".")


def _start(word: str, words: Sequence[str]) -> str:
    """The first letters of a word by which it is told from all others."""
    lengths = range(1, len(word) + 1)
    return next((word[:n] for n in lengths if sum(other.startswith(word[:n]) for other in words) == 1), word)


def _short(name: str, starts: Mapping[str, str]) -> str:
    """A block's name by the starts of its words, with a dot between what would run together."""
    text = ""
    for part in name.split("."):
        apart = text and not (part.isdigit() and text[-1].isalpha())
        text += ("." if apart else "") + starts.get(part, part)
    return text or "(top)"


def _grid(layers: Sequence[str]) -> Grid | None:
    """Each layer's block and kind, cut where the grid of both is fullest; None where no cut makes a readable one."""
    best, fill = None, LEAST_FILL
    for depth in range(1, max((name.count(".") for name in layers), default=0) + 1):
        grid = {layer: split_name(layer, depth) for layer in layers}
        blocks, kinds = _sides(grid)
        filled = len(layers) / (len(blocks) * len(kinds))
        if 3 <= len(blocks) <= MAX_BLOCKS and len(kinds) <= MAX_KINDS and filled > fill:
            best, fill = grid, filled
    return best


def _sides(grid: Grid) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Blocks in the order of their numbers, kinds in the order of the layers."""
    blocks = sorted({block for block, _ in grid.values()}, key=_natural)
    return tuple(blocks), tuple(dict.fromkeys(kind for _, kind in grid.values()))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts `layer.2` before `layer.10`, and what stands in no block last."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")] if name else [(-1, "~")]


def _common_prefix(names: Sequence[str]) -> str:
    """The leading components that all names share, with their dot."""
    shared: list[str] = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return "".join(f"{part}." for part in shared)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
