"""Which samples make which batch: a pure function of (seed, epoch, batch, rank, world), so that runs can be resumed,
spread over processes and loaded by workers without a difference.

A batch is counted over all processes. Each gets one part of it, in order: put together, the parts of all ranks are the
batch that one process would see.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ortho_cli.errors import RecipeError

from .draws import seed_of

__all__ = ["Samples", "eval_parts", "load_batches", "shuffled", "train_parts"]

Part = tuple[int, int]
"""A range of the epoch's order: first, and one behind the last."""


class Samples(Protocol):
    """What batches are made of."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        """The sample at (epoch, place)."""

    def fetch(self, epoch: int, index: Tensor) -> dict[str, Tensor]:
        """The samples at some places, as one batch."""


def shuffled(size: int, seed: int, epoch: int) -> Tensor:
    """The order of a split in an epoch: `(size,)` places, each once.

    >>> sorted(shuffled(4, 0, 0).tolist())
    [0, 1, 2, 3]
    """
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed_of(seed, epoch)))


def train_parts(size: int, batch: int, rank: int = 0, world: int = 1) -> list[Part]:
    """One rank's parts of the whole batches of an epoch; an incomplete last batch is left out.

    All batches are then alike, and the mean over ranks is the mean over samples.

    Raises:
        RecipeError: the processes cannot share a batch evenly, or the split does not fill one.

    >>> train_parts(7, 2), train_parts(7, 2, rank=1, world=2)
    ([(0, 2), (2, 4), (4, 6)], [(1, 2), (3, 4), (5, 6)])
    """
    if batch % world:
        raise RecipeError(f"a batch of {batch} cannot be shared evenly by {world} processes", hint="change data.batch")
    if batch > size:
        raise RecipeError(
            f"a batch of {batch} is more than the {size} training samples", hint=f"data.batch: {size} at most"
        )
    share = batch // world
    return [(start + rank * share, start + (rank + 1) * share) for start in range(0, size - batch + 1, batch)]


def eval_parts(size: int, batch: int, rank: int = 0, world: int = 1) -> list[Part]:
    """One rank's parts of an evaluation: every sample once over all ranks, and as many parts for each rank.

    Nothing is padded: batches are made equal instead, to within one sample, and so are their parts (of which one may
    be empty where a batch has fewer samples than there are processes).

    >>> eval_parts(7, 3), eval_parts(7, 3, rank=1, world=2)
    ([(0, 2), (2, 4), (4, 7)], [(1, 2), (3, 4), (5, 7)])
    """
    count = -(-size // batch)
    edges = [size * number // count for number in range(count + 1)]
    return [
        (start + (stop - start) * rank // world, start + (stop - start) * (rank + 1) // world)
        for start, stop in itertools.pairwise(edges)
    ]


def load_batches(
    samples: Samples, order: Tensor, parts: list[Part], epoch: int, workers: int = 0
) -> Iterator[dict[str, Tensor]]:
    """Fetch batches one after the other, in this process or ahead of time in others.

    Args:
        samples: of the split.
        order: `(size,)` places of the split, in the epoch's order.
        parts: ranges of the order, one a batch.
        epoch: handed to the samples.
        workers: processes that fetch; each fetches whole batches. They draw nothing, so their number changes nothing.
    """
    if workers == 0:
        for start, stop in parts:
            yield samples.fetch(epoch, order[start:stop])
        return
    yield from DataLoader(
        _Fetched(samples, order, epoch),
        batch_size=None,
        sampler=_Parts(parts),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # the loader draws a seed for its workers: not from the loop's generator
    )


class _Fetched(Dataset[dict[str, Tensor]]):
    """Batches by their range of an epoch's order; a class of its own so that workers can be sent it."""

    def __init__(self, samples: Samples, order: Tensor, epoch: int) -> None:
        self.samples = samples
        self.order = order
        self.epoch = epoch

    def __getitem__(self, part: Part) -> dict[str, Tensor]:
        return self.samples.fetch(self.epoch, self.order[part[0] : part[1]])


class _Parts(Sampler[Part]):
    """Hands a list of ranges to a DataLoader."""

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts

    def __iter__(self) -> Iterator[Part]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)
