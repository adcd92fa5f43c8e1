"""Sentences as tokens: cut once, kept one behind the other without filling, and filled up batch by batch."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ortho_cli.errors import CheckpointError, UsageError

from .text_data import TextSet

__all__ = ["INPUTS", "TokenSamples", "open_tokenizer"]

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def open_tokenizer(source: str) -> Any:
    """The tokenizer of a folder or hub id.

    Raises:
        UsageError: transformers, or a library that this tokenizer needs, is not installed.
        CheckpointError: there is none.
    """
    try:
        import transformers

        return transformers.AutoTokenizer.from_pretrained(source)
    except ImportError as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"the tokenizer of {source}: {reason}", hint="pip install 'ortho-cli[text]'") from error
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(
            f"no tokenizer beside {source!r}: {reason}", hint="name one: model.tokenizer: FOLDER or hub id"
        ) from error


class TokenSamples:
    """A split as token numbers.

    Args:
        texts: the split.
        tokenizer: transformers', of any kind.
        max_length: tokens a sample at most, special ones included; pairs lose tokens of their longer half first.
        filler: the token that samples are filled up with; the model does not see it.
        pad: `batch`: to a batch's longest sample; `max_length`: always to that.

    Cost: 4 bytes a token in memory, 5 with segments.
    """

    def __init__(self, texts: TextSet, tokenizer: Any, max_length: int, filler: int, pad: str) -> None:
        cut = tokenizer(texts.texts, texts.pairs, truncation=True, max_length=max_length)
        self.texts = texts
        self.starts = torch.tensor([0, *accumulate(map(len, cut["input_ids"]))])
        self.tokens = _flat(cut["input_ids"], torch.int32)
        self.segments = _flat(cut["token_type_ids"], torch.int8) if "token_type_ids" in cut else None
        self.left = getattr(tokenizer, "padding_side", "right") == "left"
        self.filler = filler
        self.width = max_length if pad == "max_length" else None

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        """One sample, without the batch dimension."""
        return {name: value[0] for name, value in self.fetch(key[0], torch.tensor([key[1]])).items()}

    def fetch(self, epoch: int, index: Tensor) -> dict[str, Tensor]:
        """A batch: the model's inputs `(B, T)` int64, `label`, `part` and `index` `(B,)`.

        Args:
            epoch: changes nothing; sentences are not augmented.
            index: `(B,)` int64, places in the split.
        """
        starts, lengths = self.starts[index], self.starts[index + 1] - self.starts[index]
        width = self.width or max([1, *lengths.tolist()])
        places = torch.arange(width) - ((width - lengths)[:, None] if self.left else 0)
        mask = (places >= 0) & (places < lengths[:, None])
        at = (starts[:, None] + places)[mask]
        batch = {"input_ids": torch.full(mask.shape, self.filler), "attention_mask": mask.long()}
        batch["input_ids"][mask] = self.tokens[at].long()
        if self.segments is not None:
            batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
            batch["token_type_ids"][mask] = self.segments[at].long()
        return {**batch, "label": self.texts.labels[index], "part": self.texts.part[index], "index": index}


def _flat(rows: list[list[int]], dtype: torch.dtype) -> Tensor:
    return torch.tensor([token for row in rows for token in row], dtype=dtype)
