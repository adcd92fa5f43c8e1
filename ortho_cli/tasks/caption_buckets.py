"""Pictures of one shape in one batch: aspect-ratio buckets, and the order of an epoch that respects them.

As all batching here, a pure function of (seed, epoch, batch, rank, world). Squares are the case of one bucket.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import log

import torch
from torch import Tensor

from ortho_cli.errors import RecipeError

from .batching import eval_parts, shuffled, train_parts
from .draws import seed_of

__all__ = ["Shape", "bucket_batches", "bucket_shapes", "eval_batches", "nearest_shapes"]

Part = tuple[int, int]
Shape = tuple[int, int]
"""Width and height in pixels."""

LONGEST = 2.0  # sides are at most this often the square's, and at least that part of it
SHUFFLES_BATCHES = 1  # beside the seed of the epoch: batches of different buckets come in a mixed order


def bucket_shapes(size: int, step: int) -> list[Shape]:
    """The shapes of about `size` x `size` pixels, never more, whose sides are multiples of `step`.

    Reference: NovelAI 2022, blog.novelai.net/novelai-improvements-on-stable-diffusion-e10d38db82ac.

    >>> bucket_shapes(64, 32)
    [(32, 96), (32, 128), (64, 64), (96, 32), (128, 32)]
    """
    least, most = max(int(size / LONGEST) // step, 1) * step, int(size * LONGEST) // step * step
    widest = {(width, min(size * size // width // step * step, most)) for width in range(least, most + 1, step)}
    tallest = {(height_first[1], height_first[0]) for height_first in widest}
    return sorted(shape for shape in widest | tallest if min(shape) >= least)


def nearest_shapes(sizes: Sequence[Shape], shapes: Sequence[Shape]) -> list[int]:
    """For each picture the number of the bucket whose ratio of sides is nearest to its own.

    >>> nearest_shapes([(300, 200), (100, 101)], [(32, 128), (64, 64), (128, 64)])
    [2, 1]
    """
    ratios = [log(width / height) for width, height in shapes]
    own = [log(width / height) for width, height in sizes]
    return [min(range(len(ratios)), key=[abs(ratio - each) for ratio in ratios].__getitem__) for each in own]


def bucket_batches(
    buckets: Sequence[int], batch: int, seed: int, epoch: int, rank: int = 0, world: int = 1
) -> tuple[Tensor, list[Part]]:
    """The order of an epoch of training, and one rank's parts of it: whole batches, each of one bucket.

    Args:
        buckets: of each sample the number of its bucket.
        batch: samples a batch, over all processes.
        seed: of the run.
        epoch: decides the order.
        rank: of this process.
        world: number of processes.

    Returns:
        `(n,)` places, without those that fill no batch this time; ranges of it.

    Raises:
        RecipeError: no bucket fills a batch, or processes cannot share one evenly.

    >>> order, parts = bucket_batches([0, 1, 0, 1, 0], 2, 0, 0)
    >>> [len({place % 2 for place in order[a:b].tolist()}) for a, b in parts]
    [1, 1]
    """
    known = torch.tensor(buckets, dtype=torch.long)
    order = shuffled(len(buckets), seed, epoch)
    whole: list[Tensor] = []
    for number in sorted(set(buckets)):
        members = order[known[order] == number]
        whole += [part for part in torch.split(members, batch) if len(part) == batch]
    if not whole:
        most = max(Counter(buckets).values(), default=0)
        raise RecipeError(
            f"a batch of {batch} is more than the {most} training samples of any one shape",
            hint=f"data.batch: {most} at most" if most else "are all pictures held out?",
        )
    mixed = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed_of(seed, epoch, SHUFFLES_BATCHES)))
    joined = torch.cat([whole[at] for at in mixed.tolist()])
    return joined, train_parts(len(joined), batch, rank, world)


def eval_batches(buckets: Sequence[int], batch: int, rank: int = 0, world: int = 1) -> tuple[Tensor, list[Part]]:
    """The order of an evaluation, and one rank's parts: every sample once over all ranks, each batch of one bucket.

    All ranks have as many parts, since they work in step. One that is too small for all of them is seen by some ranks
    again: such a part lies behind the samples, from `len(buckets)` on, and is not to be counted.

    >>> order, parts = eval_batches([0, 1, 0, 0], 2)
    >>> [sorted(order[a:b].tolist()) for a, b in parts]
    [[0], [2, 3], [1]]
    """
    places: list[int] = []
    again: list[int] = []
    parts: list[Part] = []
    for number in sorted(set(buckets)):
        members = [place for place, bucket in enumerate(buckets) if bucket == number]
        for start, stop in eval_parts(len(members), batch, rank, world):
            if stop > start:
                parts.append((len(places) + start, len(places) + stop))
            else:
                parts.append((len(buckets) + len(again), len(buckets) + len(again) + 1))
                again.append(members[0])
        places += members
    return torch.tensor(places + again, dtype=torch.long), parts
