"""How every picture of the house looks: colours that colour-blind readers can tell apart, on white and on black.

The palette is Paul Tol's "bright" (SRON technical note EPS/TN/09-002, 2021), in an order that keeps neighbours apart;
the scale of heatmaps is one hue, from the page's own background to full.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = [
    "DASHES", "DIVERGING", "DOTS_PER_INCH", "FONT", "INK", "LABEL_GAP", "PALETTE", "SCALES", "color", "dash",
]  # fmt: skip

PALETTE = ("#4477AA", "#EE6677", "#228833", "#AA3377", "#CCBB44", "#66CCEE", "#888888")
DASHES = ("solid", "dash", "dot")  # after each round through the palette
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"
DOTS_PER_INCH = 160
LABEL_GAP = 0.08  # of the height, between labels beside lines

# Text, lesser text, grid lines, the background of a figure and of the page around it, links.
INK = {
    "light": {
        "text": "#1b1f24", "faint": "#626b76", "grid": "#e4e7eb", "paper": "#ffffff", "page": "#f6f7f9",
        "accent": "#2b6ca8",
    },
    "dark": {
        "text": "#e4e8ed", "faint": "#929ca8", "grid": "#2b3139", "paper": "#171b20", "page": "#0f1215",
        "accent": "#7db6de",
    },
}  # fmt: skip
SEQUENTIAL = {
    "light": ("#f4f7fb", "#bdd3e8", "#6ea3cf", "#2b6ca8", "#0b3564"),
    "dark": ("#1d232a", "#1f466d", "#2f77b1", "#7db6de", "#dcedf9"),
}
DIVERGING = {
    "light": ("#2b6ca8", "#a9c9e3", "#f7f7f7", "#f2b3ab", "#b5323c"),
    "dark": ("#6fb1e4", "#2f5f8a", "#20262d", "#8a3b40", "#f08a88"),
}
# seaborn's "rocket" (Waskom, BSD-3-Clause), in which OIALR's figures are drawn: dark is low, on any background.
_ROCKET = ("#03051a", "#30173a", "#611f53", "#971c5b", "#cb1b4f", "#ec4a3e", "#f4865e", "#f6bb97", "#faebdd")
SCALES: dict[str, Mapping[str, Sequence[str]]] = {
    "sequential": SEQUENTIAL,
    "diverging": DIVERGING,
    "rocket": {"light": _ROCKET, "dark": _ROCKET},
}  # fmt: skip


def color(place: int) -> str:
    """The colour of a figure's series by its place.

    >>> color(0), color(7) == color(0)
    ('#4477AA', True)
    """
    return PALETTE[place % len(PALETTE)]


def dash(place: int) -> str:
    """The dashes of a series: solid, until colours repeat.

    >>> dash(6), dash(7)
    ('solid', 'dash')
    """
    return DASHES[place // len(PALETTE) % len(DASHES)]
