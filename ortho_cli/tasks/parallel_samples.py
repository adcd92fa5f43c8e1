"""Pairs of sentences as pieces, in memory, and batches of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .token_batches import flatten, ragged_rows
from .tokenization import PADDING

__all__ = ["ParallelSamples"]


class ParallelSamples(Dataset[dict[str, Tensor]]):
    """Pairs of sentences, one a row.

    Args:
        sources: pieces of each sentence, its end included.
        targets: of its translation.
    """

    def __init__(self, sources: list[list[int]], targets: list[list[int]]) -> None:
        self.sources, self.targets = flatten(sources), flatten(targets)
        widths = [starts.diff() for _, starts in (self.sources, self.targets)]
        self.lengths = torch.maximum(*widths)
        self.target_lengths = widths[1]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        """One pair, without the batch dimension."""
        return {name: value[0] for name, value in self.fetch(key[0], torch.tensor([key[1]])).items()}

    def fetch(self, epoch: int, index: Tensor) -> dict[str, Tensor]:
        """A batch: `source` (B, S) and `target` (B, T) int64, padded, and `index` (B,) as given.

        Args:
            epoch: changes nothing.
            index: `(B,)` int64, places in the part.
        """
        return {
            "source": ragged_rows(*self.sources, index, PADDING),
            "target": ragged_rows(*self.targets, index, PADDING),
            "index": index,
        }
