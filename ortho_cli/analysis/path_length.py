"""Perceptual path length: how fast a generator's picture changes along a path between two codes.

A latent space without tangles changes pictures evenly; where it does not, short ways pass through other pictures, and
the mean of the squared speed grows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["STEP", "feature_distance", "path_length", "path_points", "released_path_points", "slerp", "trimmed_mean"]

STEP = 1e-4  # of a path from 0 to 1, between the two pictures that are compared
TRIM = 0.01  # share of the shortest and of the longest that are left out
HELD = 0.7  # truncation of what the released script draws beside the coordinates
PART = 32  # paths at a time

Make = Callable[[Tensor], Tensor]
Distance = Callable[[Tensor, Tensor], Tensor]


def path_length(
    make: Make, distance: Distance, first: Tensor, second: Tensor, say: Callable[[str], None] = lambda line: None
) -> float:
    """The mean of ``distance(make(first), make(second)) / STEP**2`` without the smallest and the largest hundredth.

    Args:
        make: codes ``(B, n)`` to pictures, in float32: at this step rounding in fewer bits is all that would be seen.
        distance: of two batches of pictures, ``(B,)``; one that grows with the square, as LPIPS does.
        first: ``(N, n)``, points on paths.
        second: ``(N, n)``, each a step further.
        say: takes a line of progress.

    Cost: ``2 N`` pictures.
    Reference: Karras et al. 2019, arXiv:1812.04948, section 4.1.

    >>> ends = torch.zeros(4, 1), torch.full((4, 1), STEP)
    >>> round(path_length(lambda z: 3 * z, lambda a, b: (a - b).square().sum(1), *ends), 4)
    9.0
    """
    found: list[Tensor] = []
    for one, other in zip(torch.split(first, PART), torch.split(second, PART), strict=True):
        found.append(distance(make(one), make(other)).double().cpu() / STEP**2)
        say(f"path length: {sum(map(len, found)):,} of {len(first):,} paths")
    return trimmed_mean(torch.cat(found))


def trimmed_mean(values: Tensor, share: float = TRIM) -> float:
    """The mean of what lies between two quantiles, which are values that occur, the outer ones.

    >>> trimmed_mean(torch.tensor([1.0, 2.0, 3.0, 4.0, 1000.0]), 0.25)
    3.0
    """
    low = torch.quantile(values, share, interpolation="lower")
    high = torch.quantile(values, 1 - share, interpolation="higher")
    return float(values[(values >= low) & (values <= high)].mean())


def path_points(count: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two points a step apart on each of some paths between normal codes, anywhere on the path.

    The direction goes along the great circle, the length evenly: StyleGAN normalises its codes, so for it the direction
    alone counts; other generators have never seen codes of length 1.

    Returns:
        ``(count, columns)`` twice, float32.
    """
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randn(2, count, columns, generator=generator, dtype=torch.float64)
    places = torch.rand(count, 1, generator=generator, dtype=torch.float64)
    lengths = ends.norm(dim=-1, keepdim=True)

    def point(place: Tensor) -> Tensor:
        return (slerp(ends[0], ends[1], place) * torch.lerp(lengths[0], lengths[1], place)).float()

    return point(places), point(places + STEP)


def released_path_points(count: int, blocks: Sequence[int], columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """The points of OrthoImproveCond's script: coordinates evenly from [0, 1), each block on a sphere of its own.

    The other columns are the same for both, normal, at truncation 0.7. What it gives is to be compared with numbers of
    that script alone: the generator was trained on none of these codes.

    Args:
        count: of paths.
        blocks: coordinates in each block; they are the leading columns.
        columns: of a code.
        seed: of all that is drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    ends = torch.rand(2, count, sum(blocks), generator=generator, dtype=torch.float64)
    places = torch.rand(count, 1, generator=generator, dtype=torch.float64)
    rest = HELD * torch.randn(count, columns - sum(blocks), generator=generator, dtype=torch.float64)

    def point(place: Tensor) -> Tensor:
        parts = zip(*(torch.split(end, list(blocks), dim=1) for end in ends), strict=True)
        return torch.cat([*(slerp(one, other, place) for one, other in parts), rest], dim=1).float()

    return point(places), point(places + STEP)


def slerp(first: Tensor, second: Tensor, place: Tensor) -> Tensor:
    """Unit vectors on great circles.

    Args:
        first: ``(B, n)``, of any length.
        second: ``(B, n)``.
        place: ``(B, 1)``; 0 is the first's direction, 1 the second's.

    >>> halfway = slerp(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5]]))
    >>> halfway.square().round(decimals=4).tolist()
    [[0.5, 0.5]]
    """
    a, b = F.normalize(first, dim=-1), F.normalize(second, dim=-1)
    cosine = (a * b).sum(-1, keepdim=True).clamp(-1, 1)
    angle = place * cosine.acos()
    return F.normalize(a * angle.cos() + F.normalize(b - cosine * a, dim=-1) * angle.sin(), dim=-1)


def feature_distance(embed: Callable[[Tensor], Tensor]) -> Distance:
    """The squared distance of two pictures' features, each scaled to length 1, as LPIPS does at every place.

    Args:
        embed: pictures in [-1, 1], in colour, to ``(B, d)``.
    """
    return lambda a, b: (F.normalize(embed(a), dim=1) - F.normalize(embed(b), dim=1)).square().sum(1)
