"""Which layers have settled, since when, and what training only their cores from there on would save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ortho_cli.errors import UsageError

from .stability_change import Change

__all__ = ["LayerAdvice", "advice_text", "advise", "check_rule"]


@dataclass(frozen=True)
class LayerAdvice:
    """What a series says of one layer.

    Attributes:
        layer: its name.
        settled_at: the step at which its basis could be frozen; None: it has not settled.
        stays: whether every later comparison keeps to the threshold; None where it has not settled.
        last_stability: at the end.
        rank: components that hold 99 % of the energy, when it settled, else at the end.
        parameters: of the layer.
        trained: of the core `(rank, rank)`.
        stored: of core and both bases.
        resolved: whether every weight has full rank; if not, its stability is that of the directions it has.
    """

    layer: str
    settled_at: int | None
    stays: bool | None
    last_stability: float
    rank: int
    parameters: int
    trained: int
    stored: int
    resolved: bool


def advise(changes: Sequence[Change], *, threshold: float = 0.95, patience: int = 2) -> list[LayerAdvice]:
    """Say of every layer when OIALR would have frozen its basis.

    Args:
        changes: of one lag.
        threshold: the stability that counts as settled.
        patience: comparisons in a row that must reach it.

    Raises:
        UsageError: values that make no sense.
    """
    check_rule(threshold, patience)
    series: dict[str, list[Change]] = {}
    for change in changes:
        series.setdefault(change.layer, []).append(change)
    return [_advise_layer(sorted(found, key=lambda c: c.step), threshold, patience) for found in series.values()]


def check_rule(threshold: float, patience: int) -> None:
    """Refuse a rule that makes no sense.

    Raises:
        UsageError: with what was expected.
    """
    if not 0 < threshold <= 1 or patience < 1:
        raise UsageError(
            f"--threshold {threshold:g} --patience {patience}: a stability in (0, 1], and at least one comparison"
        )


def advice_text(advice: Sequence[LayerAdvice], threshold: float, patience: int) -> str:
    """The advice in a few sentences."""
    settled = [each for each in advice if each.settled_at is not None]
    total = sum(each.parameters for each in advice)
    rule = f"{patience} comparison{'s' * (patience > 1)} in a row of at least {threshold:g}"
    if not settled:
        highest = max(advice, key=lambda each: each.last_stability)
        return (
            f"No layer has settled ({rule}). The nearest at the end is {highest.layer}, with "
            f"{highest.last_stability:.3f}: train on, compare checkpoints that lie nearer, or lower --threshold."
        )
    last = max(each.settled_at or 0 for each in settled)
    trained = total - sum(each.parameters - min(each.trained, each.parameters) for each in settled)
    text = (
        f"{len(settled)} of {len(advice)} layers have settled ({rule}), the last of them at step {last:,}. With their "
        f"bases frozen there and only the cores trained, at the rank that holds 99 % of the energy, "
        f"{trained / total:.0%} of the {total:,} parameters of these layers would train from then on."
    )
    moved = [each.layer for each in settled if not each.stays]
    if moved:
        text += f" {len(moved)} moved again later, first {moved[0]}: a higher --patience waits for them."
    flawed = [each.layer for each in advice if not each.resolved]
    if flawed:
        text += (
            f" {len(flawed)} layer{'s' * (len(flawed) > 1)} ({', '.join(flawed[:3])}{', ...' * (len(flawed) > 3)}) "
            "did not have full rank: only the directions that are there were compared."
        )
    return text


def _advise_layer(found: Sequence[Change], threshold: float, patience: int) -> LayerAdvice:
    streak, at = 0, None
    for place, change in enumerate(found):
        streak = streak + 1 if change.stability >= threshold else 0
        if streak == patience:
            at = place
            break
    last, then = found[-1], found[-1 if at is None else at]
    stays = None if at is None else all(change.stability >= threshold for change in found[at:])
    rank = then.rank_99
    return LayerAdvice(
        last.layer, None if at is None else then.step, stays, last.stability, rank, last.parameters, rank**2,
        rank * (rank + last.rows + last.cols), all(change.is_resolved for change in found),
    )  # fmt: skip
