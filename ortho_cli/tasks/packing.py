"""Several short samples in one row, none seeing another: which go together, and the mask that keeps them apart."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

__all__ = ["packed_rows"]


def packed_rows(lengths: Sequence[int], row: int) -> list[list[int]]:
    """Share samples out to rows, by best-fit decreasing: the longest first, each where it leaves the least room.

    Args:
        lengths: of the samples, each at most `row`.
        row: tokens a row.

    Returns:
        For each row the samples in it, in the order of the data; every sample once. Rows are in the order of their
        first sample, so that they do not come sorted by length.

    Raises:
        ValueError: a sample longer than a row.

    Cost: O(n (log n + rows)) at worst for n samples, in practice far less; 22 % above the fewest possible rows at most.
    Reference: Johnson 1973, Near-optimal bin packing algorithms; Ding et al. 2024, arXiv:2404.10830.

    >>> packed_rows([5, 3, 2, 6], 8)
    [[0, 1], [2, 3]]
    """
    if max(lengths, default=0) > row:
        raise ValueError(f"a sample of {max(lengths)} tokens does not fit a row of {row}")
    rooms: list[tuple[int, int]] = []  # (room left, row), ascending
    rows: list[list[int]] = []
    for sample in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        place = bisect_left(rooms, (lengths[sample], -1))
        if place == len(rooms):
            rows.append([])
            room, chosen = row, len(rows) - 1
        else:
            room, chosen = rooms.pop(place)
        rows[chosen].append(sample)
        insort(rooms, (room - lengths[sample], chosen))
    return sorted(sorted(samples) for samples in rows)
