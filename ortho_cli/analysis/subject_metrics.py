"""How near generated pictures are to a subject's and to their prompts, and which epoch of a run to take by it.

DINO and CLIP-I are the mean cosine of all pairs of a generated and a reference picture, CLIP-T that of each picture
and its prompt (DreamBooth, arXiv:2208.12242). Choosing the epoch by the very scores that are reported flatters them,
so pictures are halved: one half chooses, the other is reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor

__all__ = ["halves", "pair_similarity", "prompt_similarity", "select_epoch", "select_epoch_as_published"]

Item = TypeVar("Item")


def pair_similarity(generated: Tensor, reference: Tensor) -> float:
    """The mean cosine over all pairs of a row of one and a row of the other, without forming the pairs.

    Args:
        generated: `(n, d)` features.
        reference: `(m, d)` features.

    Cost: O((n + m) d).

    >>> import torch
    >>> pair_similarity(torch.eye(2), torch.tensor([[3.0, 0.0]]))
    0.5
    """
    first, second = (F.normalize(each.double(), dim=1).mean(0) for each in (generated, reference))
    return float(first @ second)


def prompt_similarity(images: Tensor, texts: Tensor) -> float:
    """The mean cosine of each picture's features and those of its own prompt, both `(n, d)`.

    >>> import torch
    >>> prompt_similarity(torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    0.5
    """
    return float(F.cosine_similarity(images.double(), texts.double(), dim=1).mean())


def halves(items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    """Every other item, to choose by, and the rest, to report; of one item, that item twice.

    >>> halves("abcde")
    (['a', 'c', 'e'], ['b', 'd'])
    """
    return list(items[::2]), list(items[1::2] or items)


def select_epoch(scores: Mapping[str, Sequence[float]]) -> int:
    """The epoch whose mean rank over all scores is best; of equals the first. Higher scores are better.

    Ranks need no scale, and a score that never changes has no say.

    Args:
        scores: by metric, a value an epoch, of pictures that are not reported.

    >>> select_epoch({"dino": [0.1, 0.5, 0.6], "clip-t": [0.1, 0.1, 0.2]})
    2
    """
    ranks = [[sum(other < value for other in values) for value in values] for values in scores.values()]
    totals = [sum(column) for column in zip(*ranks, strict=True)]
    return totals.index(max(totals))


def select_epoch_as_published(scores: Mapping[str, Sequence[float]]) -> int:
    """HRA's choice: the largest sum of scores over their ranges, of the scores that are reported themselves.

    A value that is no number counts as 0. The published script divides by zero where a score never changes; here such
    a score has no say.

    >>> select_epoch_as_published({"dino": [0.2, 0.6, 0.5], "clip-t": [0.3, 0.28, 0.29]})
    2
    """
    totals = [0.0] * len(next(iter(scores.values())))
    for values in scores.values():
        clean = [0.0 if value != value else value for value in values]
        extent = max(clean) - min(clean)
        if extent:
            totals = [total + value / extent for total, value in zip(totals, clean, strict=True)]
    return totals.index(max(totals))
