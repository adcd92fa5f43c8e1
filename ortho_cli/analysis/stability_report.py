"""The report on a series: OIALR's two heatmaps, curves, ranks, every layer, and advice; and the files for programs."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from ortho_cli.errors import CheckpointError

from .report import Fact, Report
from .stability_advice import LayerAdvice, advice_text, advise
from .stability_change import COLUMNS, Change
from .stability_figures import (
    basis_and_mixing,
    change_map,
    kind_curves,
    layer_map_over_steps,
    mean_curves,
    rank_curves,
    steps_of,
    weighted_mean,
)
from .table import Table, record_table

__all__ = ["MARK", "by_lag", "read_changes", "stability_report"]

MARK = "stability.csv"  # by which an earlier report is known
WHOLE = frozenset({"step", "reference_step", "lag", "rows", "cols", "rank_90", "rank_99", "rank", "reference_rank"})
HOW = (
    "Each weight is W = P H: P has orthonormal columns and is its basis, H is what the basis is mixed by. Stability is "
    "the mean cosine between the columns of P in two checkpoints: 1 means that the basis has settled, 0 that nothing "
    "of it is left. A layer of {rows} x {cols} would show {noise:.4f} by chance."
)
TURNED = (
    "A cell that is lower by 2/n for a moment is the smallest singular value passing through zero, which turns one of "
    "n directions over. The leading directions, by --top-rank, do not see it."
)
AGAINST = "against"  # one checkpoint, the same for all
FIXED = (
    "All were compared with one checkpoint: here a layer counts as settled where it is near that one. Whether bases "
    "have stopped moving is told without --reference."
)


def stability_report(
    changes: Sequence[Change],
    *,
    name: str,
    command: str,
    notes: Sequence[str] = (),
    threshold: float = 0.95,
    patience: int = 2,
) -> Report:
    """Describe what was measured.

    Args:
        changes: of all lags.
        name: of the series.
        command: that made it, for programs.
        notes: what a reader should know of layers that are not there.
        threshold: the stability that counts as settled.
        patience: comparisons in a row that must reach it.
    """
    groups = by_lag(changes)
    label, main = next(iter(groups.items()))
    advice = advise(main, threshold=threshold, patience=patience)
    steps = steps_of(main)
    report = Report("Stability of bases", f"{name}, {label}, steps {steps[0]:,} to {steps[-1]:,}", name="stability")
    report.facts = _facts(main, advice, threshold)
    smallest = min(main, key=lambda change: change.parameters)
    has_mixing = any(math.isfinite(change.mixing_similarity) for change in main)
    maps = [
        change_map("stability", "Stability of the basis", main, lambda c: c.stability, label="stability",
                   note="Below 0.8 all is one colour, as in the paper; every value is further down."),
        change_map("mixing", "Similarity of the mixing", main, lambda c: c.mixing_similarity, label="similarity",
                   note="The cosine of H; the paper's R flips signs, which hides how little it moves."),
    ]  # fmt: skip
    report.section(
        "Which layers have settled",
        [
            HOW.format(rows=smallest.rows, cols=smallest.cols, noise=smallest.noise_floor),
            *maps[: 2 if has_mixing else 1],
        ],
    )
    report.section("Means", [mean_curves(groups), *([basis_and_mixing(main)] if has_mixing else [])])
    report.section("Every layer", [
        layer_map_over_steps("layers", "Stability of every layer", main, lambda c: c.stability, label="stability",
                             note=TURNED),
        kind_curves(main, lambda c: c.stability, name="kinds", title="Kinds of layer", label="stability"),
        *_top_figures(main),
    ])  # fmt: skip
    if any(change.rank_99 for change in main):
        report.section("Rank", [
            rank_curves(main),
            kind_curves(main, lambda c: c.rank_99 / min(c.rows, c.cols), name="rank-kinds",
                        title="Rank by kind of layer", label="of the full rank",
                        note="Components that hold 99 % of ||W||²."),
        ])  # fmt: skip
    for other, found in list(groups.items())[1:]:
        report.section(f"With {other}", [
            change_map(f"stability-{other.replace(' ', '-')}", f"Stability of the basis, {other}", found,
                       lambda c: c.stability, label="stability"),
        ])  # fmt: skip
    report.section("Advice", [
        *([FIXED] if label.startswith(AGAINST) else []), advice_text(advice, threshold, patience),
        *(f"Note: {note}." for note in notes),
        record_table("advice", "When each basis could be frozen", advice,
                     "Trained: of a core at the rank that holds 99 % of the energy; stored: with its two bases."),
    ])  # fmt: skip
    report.further = (_table(changes),)
    report.data = _data(groups, advice, command, name, notes)
    return report


def by_lag(changes: Sequence[Change]) -> dict[str, list[Change]]:
    """What was compared with what, in words -> the comparisons; a fixed reference is one group.

    >>> list(by_lag([]))
    []
    """
    references = {change.reference_step for change in changes}
    if len(references) == 1 and len({change.lag for change in changes}) != 1:
        reference = references.pop()
        return {f"{AGAINST} a reference" if reference is None else f"{AGAINST} step {reference:,}": list(changes)}
    groups: dict[str, list[Change]] = {}
    for lag in dict.fromkeys(sorted(change.lag or 0 for change in changes)):
        groups[f"lag {lag}" if lag else f"{AGAINST} a reference"] = [x for x in changes if (x.lag or 0) == lag]
    return groups


def read_changes(path: Path) -> list[Change]:
    """Read a `stability.csv` back: of an earlier report, or of a run with the method `track_stability`.

    Raises:
        CheckpointError: it is none.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            found = [_change(row) for row in csv.DictReader(file)]
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"not a table of stability: {type(error).__name__} {str(error)[:100]}",
            hint=f"expected the columns {', '.join(COLUMNS)}", where=str(path),
        ) from error  # fmt: skip
    if not found:
        raise CheckpointError("a table of stability without a row", where=str(path))
    return found


def _change(row: dict[str, str | None]) -> Change:
    values: dict[str, Any] = {}
    for name in (field.name for field in fields(Change) if field.name in row):
        text = row[name]
        if text in ("", None):
            values[name] = None
        else:
            values[name] = text if name in ("layer", "kind") else int(text or 0) if name in WHOLE else float(text or 0)
    return Change(**values)


def _facts(changes: Sequence[Change], advice: Sequence[LayerAdvice], threshold: float) -> tuple[Fact, ...]:
    last = steps_of(changes)[-1]
    final = [change.stability for change in changes if change.step == last]
    settled = sum(each.settled_at is not None for each in advice)
    lowest = min((change for change in changes if change.step == last), key=lambda change: change.stability)
    return (
        Fact(f"{fmean(final):.3f}", f"mean stability at step {last:,}"),
        Fact(f"{settled} of {len(advice)}", f"layers have settled, at {threshold:g}"),
        Fact(f"{lowest.stability:.3f}", f"the lowest at the end, {lowest.layer}"),
    )


def _top_figures(changes: Sequence[Change]) -> list[Any]:
    if all(change.top_stability is None for change in changes):
        return []
    return [
        kind_curves(changes, lambda c: c.top_stability, name="top", title="The leading directions alone",
                    label="stability", note="Blind to what the small singular values do."),
        kind_curves(changes, lambda c: c.top_overlap, name="top-overlap", title="The leading subspace",
                    label="mean squared cosine", note="Of the principal angles: blind to how the subspace is mixed."),
    ]  # fmt: skip


def _table(changes: Sequence[Change]) -> Table:
    names = [
        field.name for field in fields(Change) if field.name in COLUMNS or getattr(changes[0], field.name) is not None
    ]
    rows = tuple(tuple(getattr(change, name) for name in names) for change in changes)
    return Table("stability", "Stability", tuple(names), rows)


def _data(
    groups: dict[str, list[Change]], advice: Sequence[LayerAdvice], command: str, name: str, notes: Sequence[str]
) -> dict[str, Any]:
    means = []
    for label, found in groups.items():
        for step in steps_of(found):
            here = [change for change in found if change.step == step]
            weights = [change.parameters for change in here]
            means.append({
                "compared": label, "step": step, "stability": fmean(c.stability for c in here),
                "stability_by_parameters": weighted_mean([c.stability for c in here], weights),
                "mixing_similarity": _mean([c.mixing_similarity for c in here]),
                "r_similarity": _mean([c.r_similarity for c in here]),
            })  # fmt: skip
    return {
        "command": command, "inputs": [name], "layers": len(advice), "parameters": sum(a.parameters for a in advice),
        "means": means, "details": [asdict(each) for each in advice],
        "changes": [_plain(asdict(change)) for found in groups.values() for change in found], "notes": list(notes),
    }  # fmt: skip


def _mean(values: Sequence[float]) -> float | None:
    mean = fmean(values)
    return mean if math.isfinite(mean) else None


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    """A record as JSON can say it, which has no nan."""
    return {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in record.items()}
