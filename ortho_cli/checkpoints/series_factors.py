"""Which weight the factors of a layer multiply out to where no table says: the view of it that their shapes fit.

A square Conv1D fits as a Linear too, a transposed convolution of equal channels as a plain one: the name of GPT-2's
layers decides, else the layers of the same last word whose shape leaves no choice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .matrices import CONV1D_NAMES

if TYPE_CHECKING:
    from ortho_cli.linalg.matricize import Matricization

__all__ = ["choose_kinds", "fitting_views"]

Shape = tuple[int, ...]


def fitting_views(u: Shape, vt: Shape, shape: Shape) -> dict[str, Matricization]:
    """Find the views of a weight that factors fit, one a kind at most, the likelier kind first.

    Args:
        u: shape of `U (groups rows, r)`.
        vt: shape of `VT (groups r, cols)`.
        shape: of the weight.

    >>> list(fitting_views((8, 2), (2, 8), (8, 8))), list(fitting_views((8, 2), (2, 6), (6, 8)))
    (['linear', 'conv1d'], ['conv1d'])
    """
    from ortho_cli.linalg.matricize import Matricization

    is_matrix = len(shape) == 2
    groups = 1 if is_matrix or not u[1] or vt[0] % u[1] else vt[0] // u[1]
    found: dict[str, Matricization] = {}
    if shape[0] % groups:
        return found
    for kind in ("linear", "conv1d") if is_matrix else ("conv", "transposed"):
        for row_axes in (None,) if is_matrix else (0, None):
            view = Matricization(kind, shape, groups, row_axes)
            if (view.batch * view.rows, view.cols) == (u[0], vt[1]):
                found.setdefault(kind, view)
    return found


def choose_kinds(fits: Mapping[str, Sequence[str]], *, conv1d: bool) -> dict[str, str]:
    """Choose a kind for every layer that fits as one.

    Args:
        fits: layer -> the kinds that it fits as, the likelier first.
        conv1d: whether layers of GPT-2's names are stored as `(in, out)`.

    >>> choose_kinds({"up.0": ["transposed"], "up.1": ["conv", "transposed"], "up.2.q": ["linear"]}, conv1d=False)
    {'up.0': 'transposed', 'up.1': 'transposed', 'up.2.q': 'linear'}
    """
    votes: dict[str, Counter[str]] = {}
    for name, kinds in fits.items():
        if len(kinds) == 1:
            votes.setdefault(_word(name), Counter())[kinds[0]] += 1
    chosen = {}
    for name, kinds in fits.items():
        told = votes.get(_word(name), Counter())
        if conv1d and "conv1d" in kinds and _word(name) in CONV1D_NAMES:
            chosen[name] = "conv1d"
        elif kinds:
            chosen[name] = max(kinds, key=lambda kind: told[kind])  # the likelier, of equals
    return chosen


def _word(name: str) -> str:
    """The last part of a name that is no number."""
    return next((part for part in reversed(name.split(".")) if not part.isdigit()), name)
