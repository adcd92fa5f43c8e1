"""Attention of the translation models: four projections without biases, and what decoding keeps of earlier tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Attention", "Cache"]


class Cache:
    """Keys and values of the tokens decoded so far, of one attention layer: `(rows, heads, tokens, size)` each."""

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        self.filled = False

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add one more token; gives all of them."""
        if self.filled:
            keys, values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        self.keys, self.values, self.filled = keys, values, True
        return keys, values

    def select(self, rows: Tensor) -> None:
        """Keep some rows, in this order, perhaps more than once."""
        if self.filled:
            self.keys, self.values = self.keys[rows], self.values[rows]


class Attention(nn.Module):
    """Multi-head attention from `q_proj`, `k_proj`, `v_proj` and `out_proj`, without biases.

    The size of a head is what the projections have, so that they may be replaced by smaller ones.

    Args:
        dim: width of a token.
        heads: that share the width.
    """

    resizable_heads = True  # what may shrink heads asks for this

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def keys_and_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, heads, S, size)` each, of tokens `(B, S, dim)`."""
        return self._apart(self.k_proj(tokens)), self._apart(self.v_proj(tokens))

    def forward(
        self, tokens: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """What each token `(B, T, dim)` gathers.

        Args:
            tokens: that ask.
            keys: `(B, heads, S, size)`.
            values: of the same shape.
            mask: of bools, to `(B, heads, T, S)`: true where a token may look.
            causal: a token looks at those before it, and itself.
        """
        queries = self._apart(self.q_proj(tokens))
        mixed = F.scaled_dot_product_attention(queries, keys, values, mask, is_causal=causal)
        gathered: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return gathered

    def _apart(self, projected: Tensor) -> Tensor:
        return projected.view(*projected.shape[:-1], self.heads, -1).transpose(1, 2)
