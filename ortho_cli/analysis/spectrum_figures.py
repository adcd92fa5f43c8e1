"""Pictures of many spectra: how the energy of each layer is spread over its components, and a few spectra as curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

from .figure import Curves, Heatmap, Line

__all__ = ["energy_map", "spectrum_curves"]

SHARES = tuple(range(5, 101, 5))  # percent of the full rank
MAX_LINES = 6
MAX_POINTS = 256

Spectra = Mapping[str, Sequence[float]]


def energy_map(
    spectra: Spectra, totals: Mapping[str, float] | None = None, full: Mapping[str, int] | None = None
) -> Heatmap:
    """Cumulative energy by the share of components kept, a row a layer.

    Args:
        spectra: layer -> singular values, descending; the leading ones are enough, where the rest is known in sum.
        totals: layer -> `||W||_F^2`; None: the sum of the squares.
        full: layer -> number of components; None: as many as there are values.
    """
    rows = []
    for layer, values in spectra.items():
        count = (full or {}).get(layer, len(values))
        running = list(accumulate(value**2 for value in values))
        whole = (totals or {}).get(layer) or running[-1] or 1.0
        places = [max(1, round(share / 100 * count)) for share in SHARES]
        rows.append(tuple(running[place - 1] / whole if place <= len(running) else None for place in places))
    return Heatmap(
        "energy", "Energy held by the leading components", tuple(spectra), tuple(f"{share} %" for share in SHARES),
        tuple(rows), x_label="components kept, of the full rank", value_label="share of ||W||²", low=0.0, high=1.0,
        note="Dark early: a layer that low rank describes well. A flat spectrum darkens last.",
    )  # fmt: skip


def spectrum_curves(
    spectra: Spectra, ranks: Mapping[str, int] | None = None, *, title: str = "Singular values"
) -> Curves:
    """Singular values of a few layers, from the steepest to the flattest; a ring marks the rank that was chosen."""
    order = sorted(spectra, key=lambda layer: _steepness(spectra[layer]))
    count = min(MAX_LINES, len(order))
    picked = [order[round(place * (len(order) - 1) / max(count - 1, 1))] for place in range(count)]
    lines = [_line(layer, spectra[layer], (ranks or {}).get(layer)) for layer in dict.fromkeys(picked)]
    return Curves(
        "spectra", title, tuple(lines), "component", "of the largest", log_y=True,
        note="A few layers, from the steepest spectrum to the flattest." + (" Rings: the rank kept." if ranks else ""),
    )  # fmt: skip


def _line(layer: str, spectrum: Sequence[float], rank: int | None) -> Line:
    """One spectrum, relative to its largest value, in at most `MAX_POINTS` points."""
    values = [value / spectrum[0] for value in spectrum if value > 0]
    places = range(0, len(values), -(-len(values) // MAX_POINTS) or 1)
    ring = (float(rank), values[rank - 1], f"rank {rank}") if rank is not None and rank <= len(values) else None
    return Line(layer, [float(place + 1) for place in places], [values[place] for place in places], mark=ring)


def _steepness(values: Sequence[float]) -> float:
    """Stable rank over the number of values: small where few components hold it all."""
    largest = max(values, default=0.0) ** 2
    return sum(value**2 for value in values) / (largest * len(values)) if largest else 1.0
