"""Random numbers without a state: each is a hash of (seed, epoch, sample, column).

A sample's augmentation is then the same in any order, batch, worker or process, and after any resume; and a whole
batch is drawn at once, without a generator a sample.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["normal", "seed_of", "uniform"]

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def uniform(seed: int, epoch: int, index: NDArray[np.int64], columns: int, stream: int = 0) -> NDArray[np.float64]:
    """Draw `columns` independent uniform numbers for each sample.

    SplitMix64: a sample's generator starts at the hash of (seed, epoch, stream, index); column j is its j-th output.

    Args:
        seed: of the run.
        epoch: the samples are drawn anew in each.
        index: `(n,)` the samples' places in their split.
        columns: numbers a sample.
        stream: what they are for; different streams are independent.

    Returns:
        `(n, columns)` in [0, 1), float64.

    Reference: Steele, Lea and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014.

    >>> both, one = uniform(0, 0, np.array([5, 7]), 2), uniform(0, 0, np.array([7]), 2)
    >>> bool((both[1] == one[0]).all())
    True
    """
    with np.errstate(over="ignore"):
        start = _mix(index.astype(np.uint64) + np.uint64(seed_of(seed, epoch, stream)))
        steps = np.arange(1, columns + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        drawn: NDArray[np.float64] = (_mix(start[:, None] + steps) >> np.uint64(11)) * 2.0**-53
    return drawn


def normal(seed: int, epoch: int, index: Tensor, columns: int, stream: int) -> Tensor:
    """Standard normal numbers of some samples, each a function of its seed, epoch, place and column.

    Returns:
        `(n, columns)` float32.

    >>> both = normal(0, 0, torch.tensor([4, 9]), 3, 0)
    >>> torch.equal(both[1:], normal(0, 0, torch.tensor([9]), 3, 0))
    True
    """
    drawn = torch.from_numpy(uniform(seed, epoch, index.numpy(), columns, stream))
    values: Tensor = torch.special.ndtri(drawn.clamp_(min=2.0**-54))
    return values.float()


def seed_of(*parts: int) -> int:
    """A 63-bit seed for a generator from a few numbers, such as (seed, epoch).

    >>> seed_of(0, 1) == seed_of(0, 1), len({seed_of(0, 1), seed_of(1, 0), seed_of(0, 1, 0)})
    (True, 3)
    """
    state = len(parts)
    for part in parts:
        state = (state + (part & _MASK) + _GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * _FIRST) & _MASK
        state = ((state ^ (state >> 27)) * _SECOND) & _MASK
        state ^= state >> 31
    return state >> 1


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(_FIRST)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(_SECOND)
    value ^= value >> np.uint64(31)
    return value
