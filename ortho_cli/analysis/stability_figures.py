"""Pictures of how bases settle: OIALR's heatmaps with their mean curves, and curves over the layers and their kinds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import fsum

from .figure import Curves, Heatmap, Line
from .layer_map import split_name
from .stability_change import Change

__all__ = [
    "basis_and_mixing",
    "change_map",
    "kind_curves",
    "layer_map_over_steps",
    "mean_curves",
    "rank_curves",
    "role",
    "steps_of",
    "weighted_mean",
]

# The paper's own scale: what is below looks the same.
CLIPPED, TOP, BELOW_LIMITS = 0.8, 1.0, (0.75, 1.0)
ENDS = ("First layers", "Last layers")
MAX_KINDS = 7  # lines that a palette tells apart
MAX_HOVER = 20_000  # cells whose details a page can carry

Value = Callable[[Change], float | None]


def steps_of(changes: Iterable[Change]) -> list[int]:
    """The steps at which something was compared, ascending."""
    return sorted({change.step for change in changes})


def change_map(
    name: str, title: str, changes: Sequence[Change], value: Value, *, label: str, note: str = ""
) -> Heatmap:
    """One of OIALR's heatmaps: layers from the input down, checkpoints across, colours from 0.8 to 1, and the mean.

    Args:
        name: of its files.
        title: above it.
        changes: of one lag.
        value: what is shown of each.
        label: what it is called.
        note: below it.
    """
    steps, cells = steps_of(changes), _cells(changes, value)
    means = _means(changes, value)
    below = tuple(means.get(step) for step in steps)
    low = min((mean for mean in below if mean is not None), default=TOP)
    lowest = BELOW_LIMITS[0] if low >= BELOW_LIMITS[0] else math.floor(low * 10) / 10
    rows = tuple(tuple(row.get(step) for step in steps) for row in cells.values())
    return Heatmap(
        name, title, tuple(cells), tuple(map(str, steps)), rows, x_label="step", y_label="layer",
        value_label=label, low=CLIPPED, high=TOP, note=note, scale="rocket",
        below=below, below_label="mean", below_limits=(lowest, TOP), ends=ENDS, hover=_hover(changes, steps, cells),
    )  # fmt: skip


def layer_map_over_steps(
    name: str, title: str, changes: Sequence[Change], value: Value, *, label: str, note: str = "",
    low: float | None = None, high: float | None = None,
) -> Heatmap:  # fmt: skip
    """Every layer by name, over all values there are."""
    steps, cells = steps_of(changes), _cells(changes, value)
    rows = tuple(tuple(row.get(step) for step in steps) for row in cells.values())
    return Heatmap(
        name, title, tuple(cells), tuple(map(str, steps)), rows,
        x_label="step", value_label=label, low=low, high=high, note=note, scale="rocket",
        hover=_hover(changes, steps, cells),
    )  # fmt: skip


def mean_curves(groups: Mapping[str, Sequence[Change]]) -> Curves:
    """The mean over layers, each counted once and each by its parameters; of several lags, a pair of lines each."""
    lines = []
    for place, (label, changes) in enumerate(groups.items()):
        suffix = f", {label}" if len(groups) > 1 else ""
        for weighted, word in ((False, "each layer once"), (True, "by parameters")):
            means = _means(changes, lambda change: change.stability, weighted=weighted)
            lines.append(Line(f"{word}{suffix}", list(means), list(means.values()), place=place + 7 * weighted))
    return Curves(
        "means", "Mean stability", tuple(lines), y_label="stability",
        note="By parameters, a large layer counts for more; the paper's mean counts each once.",
    )  # fmt: skip


def basis_and_mixing(changes: Sequence[Change]) -> Curves:
    """The basis beside what it is mixed by: whether the one still moves where the other has settled."""
    parts: dict[str, Value] = {
        "basis P": lambda change: change.stability,
        "mixing H": lambda change: change.mixing_similarity,
        "R, diagonal positive": lambda change: change.r_similarity,
    }
    lines = []
    for label, value in parts.items():
        means = _means(changes, value)
        if any(math.isfinite(mean) for mean in means.values()):
            lines.append(Line(label, list(means), list(means.values())))
    return Curves(
        "basis-and-mixing", "Basis and mixing", tuple(lines), y_label="mean over layers",
        note="W = P H. P and H are compared by cosines, R by 1 - ||R1 - R2|| / (||R1|| + ||R2||), which falls faster: "
        "0.95 there is an angle of 0.1, whose cosine is 0.995.",
    )  # fmt: skip


def kind_curves(
    changes: Sequence[Change], value: Value, *, name: str, title: str, label: str, note: str = ""
) -> Curves:
    """The mean over layers of each kind, e.g. of all `attn.proj`; the kinds with most parameters."""
    kinds: dict[str, list[Change]] = {}
    for change in changes:
        kinds.setdefault(role(change.layer), []).append(change)
    sizes = {kind: sum({each.layer: each.parameters for each in found}.values()) for kind, found in kinds.items()}
    largest = sorted(sizes, key=lambda kind: -sizes[kind])[:MAX_KINDS]
    lines = []
    for kind in (kind for kind in kinds if kind in largest):
        means = _means(kinds[kind], value)
        count = len({change.layer for change in kinds[kind]})
        lines.append(Line(f"{kind} ({count})" if count > 1 else kind, list(means), list(means.values())))
    more = f" The {MAX_KINDS} kinds with most parameters of {len(kinds)}." if len(kinds) > MAX_KINDS else ""
    return Curves(name, title, tuple(lines), y_label=label, note=(note + more).strip())


def rank_curves(changes: Sequence[Change]) -> Curves:
    """How much of the full rank the layers use, as training goes on."""
    shares: dict[str, Value] = {
        "99 % of the energy": lambda change: change.rank_99 / min(change.rows, change.cols),
        "90 %": lambda change: change.rank_90 / min(change.rows, change.cols),
    }
    lines = []
    for label, value in shares.items():
        means = _means(changes, value)
        lines.append(Line(label, list(means), list(means.values())))
    return Curves(
        "ranks", "Components that hold most of ||W||²", tuple(lines), y_label="of the full rank, mean", from_zero=True
    )  # fmt: skip


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """The mean where some count for more (`fmean` has weights from Python 3.11 on).

    >>> weighted_mean([1.0, 4.0], [2.0, 1.0])
    2.0
    """
    return fsum(value * weight for value, weight in zip(values, weights, strict=True)) / fsum(weights)


def role(layer: str) -> str:
    """What a layer is in its block, heads taken together.

    >>> role("blocks.3.attn.qkv.q.head7"), role("head")
    ('attn.qkv.q', 'head')
    """
    stem, _, last = layer.rpartition(".")
    return split_name(stem if last.startswith("head") and last[4:].isdigit() else layer, 9)[1]


def _cells(changes: Sequence[Change], value: Value) -> dict[str, dict[int, float | None]]:
    cells: dict[str, dict[int, float | None]] = {}
    for change in changes:
        cells.setdefault(change.layer, {})[change.step] = value(change)
    return cells


def _means(changes: Sequence[Change], value: Value, *, weighted: bool = False) -> dict[int, float]:
    """Step -> mean over the layers that have a value."""
    at: dict[int, list[tuple[float, float]]] = {}
    for change in changes:
        each = value(change)
        if each is not None and math.isfinite(each):
            at.setdefault(change.step, []).append((each, change.parameters if weighted else 1.0))
    return {step: weighted_mean(*zip(*at[step], strict=True)) for step in sorted(at)}


def _hover(changes: Sequence[Change], steps: Sequence[int], cells: Mapping[str, object]) -> tuple[tuple[str, ...], ...]:
    """Shape and condition of each cell, where a page can carry them."""
    if len(steps) * len(cells) > MAX_HOVER:
        return ()
    told: dict[tuple[str, int], str] = {}
    for change in changes:
        flag = "" if change.is_resolved else " (rank-deficient)"
        told[change.layer, change.step] = (
            f"{change.rows} x {change.cols}, singular values {change.sigma_min:.2g} to {change.sigma_max:.2g}{flag}"
        )
    return tuple(tuple(told.get((layer, step), "") for step in steps) for layer in cells)
