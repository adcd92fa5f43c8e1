"""Which rank each layer gets: pure functions of shapes and singular values.

`scaled_rank` and `scale_for_parameters` know shapes only (a network before training), `energy_rank` and `error_rank`
the spectrum of one layer. All layers chosen together: `budget.py`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ortho_cli.errors import UsageError

__all__ = [
    "LayerSize",
    "ScaleChoice",
    "component_energies",
    "energy_rank",
    "error_rank",
    "scale_for_parameters",
    "scaled_rank",
]


@dataclass(frozen=True)
class LayerSize:
    """What a rank costs in one layer.

    Args:
        rows: of the matrix (`out * kh` for a convolution).
        cols: of the matrix.
        convolution: rounds by the paper's rule for convolutions.
        batch: matrices that share the rank (groups).
        square: whether a third factor `(r, r)` stands between the two.
    """

    rows: int
    cols: int
    convolution: bool = False
    batch: int = 1
    square: bool = False

    @property
    def dense(self) -> int:
        """Parameters of the layer as it is."""
        return self.batch * self.rows * self.cols

    def factored(self, rank: int) -> int:
        """Parameters of its factors.

        >>> LayerSize(192, 192, convolution=True).factored(9)
        3456
        """
        return self.batch * rank * (self.rows + self.cols + (rank if self.square else 0))

    @property
    def saving_rank(self) -> int:
        """The largest rank whose factors are smaller than the layer; 0 where none is.

        >>> LayerSize(64, 64).saving_rank, LayerSize(64, 1).saving_rank
        (31, 0)
        """
        rank = (self.rows * self.cols - 1) // (self.rows + self.cols)
        while self.square and rank and self.factored(rank) >= self.dense:
            rank -= 1
        return rank


def scaled_rank(size: LayerSize, scale: float) -> int:
    """Round a share of the full rank to a rank, by the paper's rules.

    A Linear takes `round(scale * min(rows, cols))`, a convolution `round(scale * rows)`, rows being `out * kh`; halves
    go to the even neighbour. Never below 1: a layer of rank 0 forgets its input (the paper's Linear rule has no floor).

    Reference: FNL, arXiv:2105.01029, and its code.

    >>> scaled_rank(LayerSize(192, 192, convolution=True), 0.047607422), scaled_rank(LayerSize(320, 768), 0.25)
    (9, 80)
    """
    return max(1, round(scale * _base(size)))


@dataclass(frozen=True)
class ScaleChoice:
    """A rank scale, the ranks it gives (None: that layer stays dense), and the parameters of the whole."""

    scale: float
    ranks: tuple[int | None, ...]
    parameters: int


def scale_for_parameters(
    layers: Sequence[LayerSize], others: int, target: float, compat: str | None = None
) -> ScaleChoice:
    """Find the one rank scale with which a network comes closest to a share of its parameters.

    Parameters are a step function of the scale. Its steps are known from the shapes, so the nearest value is found
    exactly, without building a network; a layer whose factors would not be smaller stays dense.

    Args:
        layers: those to be factored.
        others: parameters of everything else (biases, norms, the first and last layer).
        target: parameters after / before.
        compat: "bisection" repeats the paper's search instead (midpoints from (0, 1), the visited point nearest to the
            target, every layer factored), which returns its published ranks.

    Raises:
        UsageError: a target that no scale in (0, 1] comes near: below rank 1 everywhere, or above all dense.

    Cost: `O(S log S)` for `S` distinct steps.
    Reference: FNL, arXiv:2105.01029, `make.py`.

    >>> scale_for_parameters([LayerSize(100, 100)], 0, 0.1).ranks
    (5,)
    """
    if compat not in (None, "bisection"):
        raise ValueError(f"compat {compat!r} is not 'bisection'")
    total = others + sum(size.dense for size in layers)
    if compat == "bisection":
        scale = _bisect(lambda trial: _choose(layers, others, trial, keep=False).parameters / total, target)
        return _choose(layers, others, scale, keep=False)
    if not layers or not 0 < target <= 1:
        raise UsageError(f"target ratio {target} is not in (0, 1]")
    lowest = _choose(layers, others, 0.0, keep=True)
    if lowest.parameters > target * total:
        raise UsageError(
            f"target ratio {target} cannot be reached: rank 1 everywhere leaves {lowest.parameters / total:.4f}",
            hint="raise the target or factor more layers",
        )
    steps = sorted({(2 * k + 1) / (2 * base) for base in map(_base, layers) for k in range(base)})
    # On a step, where halves go to the even neighbour, some layers have moved; between two steps nothing does, so that
    # the middle stands for all of an interval.
    between = [(low + high) / 2 for low, high in zip([0.0, *steps], [*steps, 1.0], strict=True)]
    scales = sorted([*steps, *between])
    place = bisect_right(scales, target * total, key=lambda trial: _choose(layers, others, trial, keep=True).parameters)
    near = [_choose(layers, others, scale, keep=True) for scale in scales[place - 1 : place + 1]]
    return min(near, key=lambda choice: abs(choice.parameters - target * total))


def energy_rank(values: Tensor, energy: float) -> int:
    """Count the components that hold a share of `||W||_F^2`.

    Args:
        values: all singular values, descending, `(k)`, or `(batch, k)` for matrices that share their rank.
        energy: in (0, 1].

    >>> import torch
    >>> energy_rank(torch.tensor([3.0, 2.0, 1.0]), 0.9)
    2
    """
    if not 0 < energy <= 1:
        raise UsageError(f"energy {energy} is not in (0, 1]")
    return _shortest(values, 1 - energy)


def error_rank(values: Tensor, max_error: float) -> int:
    """Count the components needed to keep `||W - U VT||_F <= max_error ||W||_F`.

    >>> import torch
    >>> error_rank(torch.tensor([3.0, 2.0, 1.0]), 0.3)
    2
    """
    if not 0 <= max_error < 1:
        raise UsageError(f"max error {max_error} is not in [0, 1)")
    return _shortest(values, max_error**2)


def _shortest(values: Tensor, share: float) -> int:
    """The smallest rank that loses at most this share of the energy; summed from the small end, where digits are."""
    squares = component_energies(values)
    tails = squares.flip(0).cumsum(0).flip(0)
    return max(1, int((tails > share * tails[0]).sum()))


def component_energies(values: Tensor) -> Tensor:
    """Square the singular values `(..., k)` and sum over matrices that share a rank: `(k)`, float64, on the CPU."""
    return values.double().square().reshape(-1, values.shape[-1]).sum(0).cpu()


def _base(size: LayerSize) -> int:
    return size.rows if size.convolution else min(size.rows, size.cols)


def _choose(layers: Sequence[LayerSize], others: int, scale: float, *, keep: bool) -> ScaleChoice:
    ranks = [scaled_rank(size, scale) for size in layers]
    kept = [None if keep and rank > size.saving_rank else rank for size, rank in zip(layers, ranks, strict=True)]
    costs = [size.dense if rank is None else size.factored(rank) for size, rank in zip(layers, kept, strict=True)]
    return ScaleChoice(scale, tuple(kept), others + sum(costs))


def _bisect(ratio: Callable[[float], float], target: float, tolerance: float = 1e-6) -> float:
    """The paper's search: of the midpoints visited, the first that is nearest to the target."""
    lower, upper = 0.0, 1.0
    best, distance = 0.5, float("inf")
    while True:
        middle = (lower + upper) / 2
        found = ratio(middle)
        if abs(found - target) < distance:
            best, distance = middle, abs(found - target)
        if upper - lower < tolerance or abs(found - target) < tolerance:
            return best
        lower, upper = (middle, upper) if found < target else (lower, middle)
