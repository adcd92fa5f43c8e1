"""Batches of sentences by their number of pieces: sentences of like length together, up to so many pieces.

Like all batches a pure function of (seed, epoch). Lengths are what they are in every epoch, so the cuts between batches
are too; which of the equally long sentences are in a batch, and the order of batches, is drawn anew.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ortho_cli.errors import RecipeError

from .batching import shuffled
from .draws import seed_of

__all__ = ["batch_order", "flatten", "ragged_rows", "token_cuts", "token_order"]

ORDER_STREAM = 1


def token_cuts(lengths: Tensor, limit: int, multiple: int = 1) -> list[tuple[int, int]]:
    """Cut sentences, shortest first, into batches that hold at most `limit` pieces when they are padded.

    Args:
        lengths: `(n,)` rising.
        limit: pieces of a batch, padding included.
        multiple: of sentences in each batch; what is left over at the end stays out.

    Returns:
        Ranges of the order, first and one behind the last.

    Raises:
        RecipeError: the longest sentences do not fit.

    >>> token_cuts(torch.tensor([1, 1, 2, 3, 3, 4]), 6)
    [(0, 3), (3, 5), (5, 6)]
    """
    cuts: list[tuple[int, int]] = []
    start = 0
    steps = range(multiple, len(lengths) - len(lengths) % multiple + 1, multiple)
    longest = lengths.tolist()
    for stop in steps:
        if (stop - start) * longest[stop - 1] <= limit:
            continue
        if stop - start > multiple:
            cuts.append((start, stop - multiple))
            start = stop - multiple
        if multiple * longest[stop - 1] > limit:
            raise RecipeError(
                f"a batch of {limit} pieces does not hold {multiple} sentence{'s' * (multiple > 1)} of "
                f"{longest[stop - 1]}",
                hint="raise data.batch (or data.eval_batch), or lower data.max_length",
            )
    stop = len(lengths) - len(lengths) % multiple
    return [*cuts, (start, stop)] if stop > start else cuts


def token_order(lengths: Tensor, seed: int, epoch: int) -> Tensor:
    """Places of sentences, shortest first, those of one length in an order drawn from (seed, epoch)."""
    drawn = shuffled(len(lengths), seed, epoch)
    return drawn[torch.argsort(lengths[drawn], stable=True)]


def batch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch's batches."""
    generator = torch.Generator().manual_seed(seed_of(seed, epoch, ORDER_STREAM))
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


def ragged_rows(flat: Tensor, starts: Tensor, index: Tensor, padding: int) -> Tensor:
    """Some sentences of all, which lie one behind the other, as a padded batch.

    Args:
        flat: pieces of all sentences.
        starts: `(n + 1,)` where each begins, and the end.
        index: `(B,)` sentences.
        padding: what fills up.

    Returns:
        `(B, longest)` int64.

    >>> ragged_rows(torch.tensor([5, 6, 7]), torch.tensor([0, 2, 3]), torch.tensor([1, 0]), 0).tolist()
    [[7, 0], [5, 6]]
    """
    first, lengths = starts[index], starts[index + 1] - starts[index]
    places = torch.arange(int(lengths.max()) if len(index) else 0)
    inside = places < lengths[:, None]
    rows = flat[(first[:, None] + places).clamp_(max=len(flat) - 1)].long()
    return rows.masked_fill_(~inside, padding)


def flatten(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Sentences one behind the other as int32, and where each begins, `(n + 1,)`."""
    lengths = torch.tensor([0, *map(len, rows)])
    return torch.tensor([piece for row in rows for piece in row], dtype=torch.int32), lengths.cumsum(0)
