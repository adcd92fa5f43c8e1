"""The Transformer that translates: encoder and decoder, norms before what they norm, no biases but the last layer's.

As FNL has it (arXiv:2105.01029, its `transformer_small`), after Vaswani et al. 2017, arXiv:1706.03762. It is trained on
whole sentences and decoded token by token, with the keys and values of earlier tokens kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ortho_cli.errors import UsageError

from .translator_attention import Attention, Cache

if TYPE_CHECKING:
    from ortho_cli.recipe.translation import TransformerBase, TransformerSmall

__all__ = ["Decoding", "Translator", "build"]

NORM_EPS = 1e-6
EMBEDDING_STD = 0.1  # all embeddings from N(0, 0.1^2), all other matrices from U(-0.1, 0.1), as the paper's code
LINEAR_BOUND = 0.1


def build(config: TransformerSmall | TransformerBase, sources: int, targets: int, padding: int) -> nn.Module:
    """The translator of a recipe's `model` section, for two vocabularies."""
    return Translator(
        sources, targets, padding, dim=config.dim, hidden=config.hidden, heads=config.heads, depth=config.depth,
        positions=config.positions, dropout=config.dropout, activation_dropout=config.activation_dropout,
    )  # fmt: skip


@dataclass
class Decoding:
    """How far some sentences are translated: `beams` rows a sentence, all of one length.

    Attributes:
        memory: keys and values of the source for each block of the decoder, `(sentences, heads, S, size)`.
        mask: `(sentences, 1, 1, S)`, true where the source is no padding.
        caches: of each block, over `sentences * beams` rows.
        length: tokens decoded so far.
    """

    memory: list[tuple[Tensor, Tensor]]
    mask: Tensor
    caches: list[Cache]
    length: int = field(default=0)

    def select(self, sentences: Tensor, rows: Tensor) -> None:
        """Keep some sentences, and of all rows (sentence by sentence) these."""
        if len(sentences) != len(self.mask):
            self.memory = [(keys[sentences], values[sentences]) for keys, values in self.memory]
            self.mask = self.mask[sentences]
        for cache in self.caches:
            cache.select(rows)


class Translator(nn.Module):
    """Encoder and decoder.

    Args:
        sources: pieces of the source language.
        targets: pieces of the target language.
        padding: the piece that fills up sources.
        dim: width of a token.
        hidden: width of the feed-forward layers.
        heads: attention heads; divides `dim`.
        depth: blocks of each of the two.
        positions: rows of each table of positions, and so the longest sentence.
        dropout: share dropped of embeddings and of what a block adds, while training.
        activation_dropout: share dropped behind ReLU.

    Shapes: sources `(B, S)` and targets `(B, T)`, both of piece numbers, to scores `(B, T, targets)` of what follows
    each target token.

    >>> model = Translator(10, 12, 0, dim=8, hidden=16, heads=2, depth=1)
    >>> model(torch.ones(3, 5, dtype=torch.long), torch.ones(3, 4, dtype=torch.long)).shape
    torch.Size([3, 4, 12])
    """

    def __init__(
        self,
        sources: int,
        targets: int,
        padding: int,
        *,
        dim: int,
        hidden: int,
        heads: int,
        depth: int,
        positions: int = 1024,
        dropout: float = 0.0,
        activation_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.padding, self.positions = padding, positions
        sizes = (dim, hidden, heads, dropout, activation_dropout)
        self.encoder = Stack(EncoderBlock, depth, Embed(sources, positions, dim, dropout), *sizes)
        self.decoder = Stack(DecoderBlock, depth, Embed(targets, positions, dim, dropout), *sizes)
        self.out_embed = nn.Linear(dim, targets)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=EMBEDDING_STD)
            elif isinstance(module, nn.Linear):
                nn.init.uniform_(module.weight, -LINEAR_BOUND, LINEAR_BOUND)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Scores of what follows each target token."""
        memory, mask = self._encode(source)
        tokens = self.decoder.embed(target, 0)
        for block in self.decoder.blocks:
            tokens = block(tokens, block.cross.keys_and_values(memory), mask)
        scores: Tensor = self.out_embed(self.decoder.norm(tokens))
        return scores

    def start(self, source: Tensor) -> Decoding:
        """Read sources `(B, S)`; nothing is translated yet."""
        memory, mask = self._encode(source)
        blocks = self.decoder.blocks
        return Decoding([block.cross.keys_and_values(memory) for block in blocks], mask, [Cache() for _ in blocks])

    def step(self, tokens: Tensor, decoding: Decoding) -> Tensor:
        """Log-probabilities of what follows the last token of each row, which is taken into `decoding`.

        Args:
            tokens: `(sentences, beams)`, the next piece of each row.
            decoding: of as many rows.

        Returns:
            `(sentences, beams, targets)` float32.
        """
        sentences, beams = tokens.shape
        if decoding.length >= self.positions:
            raise UsageError(f"a translation has at most {self.positions} pieces (model.positions)")
        found = self.decoder.embed(tokens.reshape(-1, 1), decoding.length)
        decoding.length += 1
        for block, memory, cache in zip(self.decoder.blocks, decoding.memory, decoding.caches, strict=True):
            found = block.step(found, memory, decoding.mask, cache, beams)
        scores = self.out_embed(self.decoder.norm(found))
        return F.log_softmax(scores.float(), -1).view(sentences, beams, -1)

    def _encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's tokens, and where they are no padding."""
        mask = (source != self.padding)[:, None, None]
        tokens = self.encoder.embed(source, 0)
        for block in self.encoder.blocks:
            tokens = block(tokens, mask)
        return self.encoder.norm(tokens), mask


class Embed(nn.Module):
    """Pieces and their places as tokens."""

    def __init__(self, pieces: int, positions: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.tokens = nn.Embedding(pieces, dim)
        self.positions = nn.Embedding(positions, dim)
        self.limit, self.dropout = positions, dropout

    def forward(self, pieces: Tensor, first: int) -> Tensor:
        """Tokens `(B, T, dim)` of pieces `(B, T)`, the first of which stands at place `first`."""
        if first + pieces.shape[1] > self.limit:
            raise UsageError(
                f"a sentence has {first + pieces.shape[1]} pieces, and the model {self.limit} positions",
                hint="shorten it, or raise model.positions",
            )
        places = torch.arange(first, first + pieces.shape[1], device=pieces.device)
        return F.dropout(self.tokens(pieces) + self.positions(places), self.dropout, self.training)


class Stack(nn.Module):
    """Embeddings, blocks and a last norm: the parts of an encoder or a decoder."""

    blocks: Any  # an nn.ModuleList, of blocks of one kind

    def __init__(self, kind: type[nn.Module], depth: int, embed: Embed, dim: int, *sizes: float) -> None:
        super().__init__()
        self.embed = embed
        self.blocks = nn.ModuleList(kind(dim, *sizes) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, NORM_EPS)


class FeedForward(nn.Module):
    """Two layers with ReLU between them."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, dim, bias=False)
        self.dropout = dropout

    def forward(self, tokens: Tensor) -> Tensor:
        made: Tensor = self.fc2(F.dropout(F.relu(self.fc1(tokens)), self.dropout, self.training))
        return made


class EncoderBlock(nn.Module):
    """Attention among the source's tokens, then the feed-forward layers; each added to what it reads."""

    def __init__(self, dim: int, hidden: int, heads: int, dropout: float, activation_dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim, NORM_EPS)
        self.attention = Attention(dim, heads)
        self.feed_forward_norm = nn.LayerNorm(dim, NORM_EPS)
        self.feed_forward = FeedForward(dim, hidden, activation_dropout)
        self.dropout = dropout

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        normed = self.attention_norm(tokens)
        tokens = tokens + self._drop(self.attention(normed, *self.attention.keys_and_values(normed), mask))
        return tokens + self._drop(self.feed_forward(self.feed_forward_norm(tokens)))

    def _drop(self, added: Tensor) -> Tensor:
        return F.dropout(added, self.dropout, self.training)


class DecoderBlock(EncoderBlock):
    """Attention to earlier tokens, attention to the source, then the feed-forward layers."""

    def __init__(self, dim: int, hidden: int, heads: int, dropout: float, activation_dropout: float) -> None:
        super().__init__(dim, hidden, heads, dropout, activation_dropout)
        self.cross_norm = nn.LayerNorm(dim, NORM_EPS)
        self.cross = Attention(dim, heads)

    def forward(self, tokens: Tensor, memory: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:  # type: ignore[override]
        normed = self.attention_norm(tokens)
        own = self.attention(normed, *self.attention.keys_and_values(normed), causal=True)
        tokens = tokens + self._drop(own)
        tokens = tokens + self._drop(self.cross(self.cross_norm(tokens), *memory, mask))
        return tokens + self._drop(self.feed_forward(self.feed_forward_norm(tokens)))

    def step(self, tokens: Tensor, memory: tuple[Tensor, Tensor], mask: Tensor, cache: Cache, beams: int) -> Tensor:
        """One more token a row, `(rows, 1, dim)`; the rows of a sentence ask its source together."""
        normed = self.attention_norm(tokens)
        tokens = tokens + self.attention(normed, *cache.append(*self.attention.keys_and_values(normed)))
        asking = self.cross_norm(tokens).view(-1, beams, tokens.shape[-1])
        tokens = tokens + self.cross(asking, *memory, mask).reshape(tokens.shape)
        made: Tensor = tokens + self.feed_forward(self.feed_forward_norm(tokens))
        return made
