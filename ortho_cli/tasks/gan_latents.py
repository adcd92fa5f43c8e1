"""What each coordinate of a generator's code changes: traversals, pairs that differ in one, and SeFa's basis.

The leading columns of the noise, `generator.latents`, are what is moved; the rest is held.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .draws import normal, uniform

__all__ = ["codes", "pairs", "sefa_rotation", "traversal"]

CODE_STREAM, PAIR_STREAM = 7, 8  # of the random numbers, beside those of training
HELD = 0.7  # truncation of what a pair shares, as the published pairs have it


def codes(seed: int, index: Tensor, columns: int, truncation: float = 1.0) -> Tensor:
    """Noise by number: picture 7 is the same whichever others are made.

    Args:
        seed: of all pictures.
        index: ``(n,)`` int64, their numbers.
        columns: of the noise.
        truncation: scales it; below 1 gives likelier and less varied pictures.

    Returns:
        ``(n, columns)`` float32.
    """
    return truncation * normal(seed, 0, index, columns, CODE_STREAM)


def traversal(noise: Tensor, column: int, values: Tensor) -> Tensor:
    """Every row of the noise with one column set to each of some values.

    Returns:
        ``(rows * values, columns)``, the values of a row one after the other.

    >>> traversal(torch.zeros(1, 3), 1, torch.tensor([-4.0, 4.0])).tolist()
    [[0.0, -4.0, 0.0], [0.0, 4.0, 0.0]]
    """
    moved = noise.repeat_interleave(len(values), dim=0)
    moved[:, column] = values.repeat(len(noise)).to(moved)
    return moved


def pairs(seed: int, index: Tensor, latents: int, columns: int, extent: float) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of codes that differ in one coordinate, evenly drawn, from which a classifier may learn what it changes.

    Args:
        seed: of all pairs.
        index: ``(n,)`` int64, their numbers.
        latents: leading columns, drawn evenly from ``[-extent, extent]``; the others are normal, at truncation 0.7.
        columns: of the noise.
        extent: of the coordinates.

    Returns:
        Two codes ``(n, columns)``, and the first's coordinates minus the second's ``(n, latents)``.

    Reference: Zhu et al. 2020, arXiv:2007.10785, section 4 (variation predictability).
    """
    drawn = torch.from_numpy(uniform(seed, 0, index.numpy(), latents + 2, PAIR_STREAM).astype(np.float32))
    first = codes(seed, index, columns, HELD)
    first[:, :latents] = extent * (2 * drawn[:, :latents] - 1)
    which = (drawn[:, latents] * latents).long().clamp(max=latents - 1)  # in float32 a draw may round to 1
    second = first.clone()
    second[torch.arange(len(index)), which] = extent * (2 * drawn[:, -1] - 1)
    return first, second, (first - second)[:, :latents]


def sefa_rotation(matrices: list[Tensor]) -> Tensor:
    """The rotation of a code to the directions that its first weights stretch most.

    Args:
        matrices: ``(n_i, d_i)``, by which consecutive coordinates enter the generator.

    Returns:
        ``R (n, n)``, orthogonal, block by block; give the generator ``z @ R.T`` in place of ``z``.

    Reference: Shen and Zhou 2021, arXiv:2007.06600, equation 5.

    >>> weight = torch.tensor([[0.0, 1.0], [3.0, 0.0]])
    >>> sefa_rotation([weight]).abs().tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    grams = [each.double() @ each.double().T for each in matrices]
    turns = [torch.linalg.eigh(gram).eigenvectors.flip(1).float() for gram in grams]
    whole = torch.zeros(2 * (sum(map(len, turns)),), device=turns[0].device)
    first = 0
    for turn in turns:
        whole[first : first + len(turn), first : first + len(turn)] = turn
        first += len(turn)
    return whole
