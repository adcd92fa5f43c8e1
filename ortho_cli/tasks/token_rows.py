"""Samples as tokens: where the response begins, rows of one sample or several, batches padded to their longest row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .instruct_data import Pairs
from .packing import packed_rows
from .templates import prompt_text, response_text

__all__ = ["IGNORED", "Sample", "TokenRows", "encode"]

IGNORED = -100  # a label that is not learnt, as torch's cross-entropy has it
PART = 1000  # texts that are tokenized at once


@dataclass(frozen=True)
class Sample:
    """One sample: `ids` (n,) int32; the tokens before `start` are given, those from it on are learnt."""

    ids: Tensor
    start: int


def encode(pairs: Pairs, tokenizer: Any, template: str, max_length: int, *, learn_all: bool = False) -> list[Sample]:
    """Tokenize pairs: prompt and response as one text, then the end-of-sequence token, cut off at `max_length`.

    The prompt is tokenized alone too: what both have in common is given, so that a token which reaches over the border
    is learnt, as at the border a model is asked to go on.

    Args:
        pairs: queries and responses.
        tokenizer: a transformers tokenizer with an end-of-sequence token.
        template: as `prompt_text` takes it.
        max_length: tokens a sample.
        learn_all: learn the prompt's tokens too.
    """
    samples = []
    special = template != "chat"  # a chat template writes its own
    for first in range(0, len(pairs), PART):
        last = min(first + PART, len(pairs))
        prompts, texts = [], []
        for query, response in zip(pairs.queries[first:last], pairs.responses[first:last], strict=True):
            prompts.append(prompt_text(template, query, tokenizer))
            texts.append(prompts[-1] + response_text(template, query, response, tokenizer))
        given = tokenizer(prompts, add_special_tokens=special).input_ids
        for prompt, ids in zip(given, tokenizer(texts, add_special_tokens=special).input_ids, strict=True):
            if ids[-1:] != [tokenizer.eos_token_id]:
                ids = [*ids, tokenizer.eos_token_id]
            start = 0 if learn_all else _common(prompt, ids)
            samples.append(Sample(torch.tensor(ids[:max_length], dtype=torch.int32), start))
    return samples


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    for place, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return place
    return min(len(first), len(second))


class TokenRows(Dataset[dict[str, Tensor]]):
    """Rows of tokens, each of one sample or, packed, of several.

    Args:
        samples: tokenized.
        pad: id of the padding token.
        row: tokens a packed row; None: a row is one sample.
        indexed: batches say by `index` which samples they are of, so that answers to them can be asked for.

    Attributes:
        learnt: `(rows,)` int64, tokens of each row that are learnt.
    """

    def __init__(self, samples: list[Sample], pad: int, row: int | None = None, *, indexed: bool = False) -> None:
        self.samples = samples
        self.pad = pad
        self.is_packed, self.is_indexed = row is not None, indexed
        lengths = [len(sample.ids) for sample in samples]
        self.rows = [[place] for place in range(len(samples))] if row is None else packed_rows(lengths, row)
        # The first token of a sample has nothing before it to be learnt from.
        counts = [max(0, len(sample.ids) - max(sample.start, 1)) for sample in samples]
        self.learnt = torch.tensor([sum(counts[place] for place in places) for places in self.rows])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        """One row, without the batch dimension."""
        return {name: value[0] for name, value in self.fetch(key[0], torch.tensor([key[1]])).items()}

    def fetch(self, epoch: int, index: Tensor) -> dict[str, Tensor]:
        """A batch of rows, as long as the longest of them.

        Args:
            epoch: changes nothing.
            index: `(B,)` places.

        Returns:
            `input_ids` and `labels` `(B, L)` int64, labels being `IGNORED` where nothing is learnt;
            `position_ids` `(B, L)` of packed rows, counted from 0 in each sample; and `index`, where it is wanted.
        """
        rows = [self._row(place) for place in index.tolist()]
        length = max((len(row["input_ids"]) for row in rows), default=1)
        fill = {"input_ids": self.pad, "labels": IGNORED, "position_ids": 0}
        batch = {
            name: torch.full((len(rows), length), value)
            for name, value in fill.items()
            if name != "position_ids" or self.is_packed
        }
        for place, row in enumerate(rows):
            for name, values in batch.items():
                values[place, : len(row[name])] = row[name]
        return {**batch, "index": index} if self.is_indexed else batch

    def _row(self, place: int) -> dict[str, Tensor]:
        own = [self.samples[sample] for sample in self.rows[place]]
        labels = []
        for sample in own:
            label = sample.ids.long()
            label[: max(sample.start, 1)] = IGNORED
            labels.append(label)
        return {
            "input_ids": torch.cat([sample.ids for sample in own]).long(),
            "labels": torch.cat(labels),
            "position_ids": torch.cat([torch.arange(len(sample.ids)) for sample in own]),
        }
