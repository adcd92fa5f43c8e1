"""torch's MultiheadAttention with its input projections as layers of their own, so that methods can work on them.

`nn.MultiheadAttention` holds the projections of query, key and value as bare parameters and hands its output
projection's weight to one fused function: no layer in it can be replaced. This computes the same from Linear layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ortho_cli.errors import UsageError

from .adapter_layer import is_sharded
from .basis_layers import BasisLinear
from .inject import replace_modules

__all__ = ["PROJECTIONS", "ProjectedAttention", "closed_names", "open_attention"]

FUSED, SPLIT = ("in_proj",), ("q_proj", "k_proj", "v_proj")
PROJECTIONS = (*FUSED, *SPLIT)


class ProjectedAttention(nn.Module):
    """Multi-head attention whose projections are layers: `in_proj`, or `q_proj`, `k_proj`, `v_proj`, and `out_proj`.

    Args:
        base: an `nn.MultiheadAttention`; its parameters are taken over as they are, so an optimizer goes on with them.

    Shapes, masks and options: those of `nn.MultiheadAttention`.

    >>> base = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    >>> tokens = torch.randn(3, 5, 8)
    >>> ours, theirs = ProjectedAttention(base)(tokens, tokens, tokens), base(tokens, tokens, tokens)
    >>> [torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs)]
    [True, True]
    """

    # What torch's TransformerEncoderLayer asks before it takes a fused path around this module.
    _qkv_same_embed_dim = False

    in_proj: nn.Linear
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    out_proj: nn.Linear
    in_proj_bias: nn.Parameter | None
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None

    def __init__(self, base: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = base.embed_dim, base.num_heads, base.head_dim
        self.dropout, self.batch_first, self.add_zero_attn = base.dropout, base.batch_first, base.add_zero_attn
        self.is_fused = base.in_proj_weight is not None
        for name in FUSED if self.is_fused else SPLIT:
            setattr(self, name, _linear(getattr(base, f"{name}_weight")))
        for name in ("in_proj_bias", "bias_k", "bias_v"):
            self.register_parameter(name, getattr(base, name))
        self.out_proj = base.out_proj
        self.train(base.training)

    @property
    def in_proj_weight(self) -> Tensor | None:
        """The fused projection's weight, for whoever reads it."""
        return self.in_proj.weight if self.is_fused else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if is_causal and attn_mask is None:
            raise UsageError("is_causal says that attn_mask is causal, and there is no attn_mask")
        batched = query.dim() == 3
        projected = self._project(query, key, value)
        batch_axis = 0 if self.batch_first or not batched else 1
        query, key, value = (_per_head(each, self.num_heads, batched, batch_axis) for each in projected)
        mask = _merged_mask(attn_mask, key_padding_mask, query, key)
        for extra_key, extra_value in self._extras(query):
            key, value = torch.cat([key, extra_key], 2), torch.cat([value, extra_value], 2)
            mask = None if mask is None else F.pad(mask, (0, 1))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = query @ key.mT * self.head_dim**-0.5
            weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), dropout)
            mixed = weights @ value
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, mask, dropout)
        joined = mixed.transpose(1, 2).flatten(2)
        outputs = self.out_proj(joined if batch_axis == 0 else joined.transpose(0, 1))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            outputs, weights = outputs[0], None if weights is None else weights[0]
        return outputs, weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """The three inputs through their projections; a fused one does once what it can do at once."""
        width = self.embed_dim
        biases: list[Any] = [None] * 3 if self.in_proj_bias is None else list(self.in_proj_bias.chunk(3))
        if not self.is_fused:
            found = [self.q_proj(query), self.k_proj(key), self.v_proj(value)]
        elif query is key and key is value:
            found = list(self.in_proj(query).chunk(3, -1))
        else:
            parts = [slice(place * width, (place + 1) * width) for place in range(3)]
            found = [_rows_of(self.in_proj, each, rows) for each, rows in zip((query, key, value), parts, strict=True)]
        return [each if bias is None else each + bias for each, bias in zip(found, biases, strict=True)]

    def _extras(self, query: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values that every query sees beside the given ones."""
        shape = (len(query), self.num_heads, 1, self.head_dim)
        found = []
        if self.bias_k is not None and self.bias_v is not None:
            key, value = (each.view(1, *shape[1:]).expand(shape) for each in (self.bias_k, self.bias_v))
            found.append((key, value))
        if self.add_zero_attn:
            found.append((query.new_zeros(shape),) * 2)
        return found


def open_attention(model: nn.Module, names: set[str] | None = None) -> list[str]:
    """Put `ProjectedAttention` in place of torch's attention, in a model that computes the same afterwards.

    Args:
        model: changed in place; not itself replaced.
        names: of the modules; None: all that are torch's own, not a subclass with a forward of its own.

    Returns:
        Their names.
    """
    plain = nn.MultiheadAttention.forward
    found = {
        name: module
        for name, module in model.named_modules()
        if name and isinstance(module, nn.MultiheadAttention) and type(module).forward is plain
        and (names is None or name in names)
    }  # fmt: skip
    replace_modules(model, {id(module): ProjectedAttention(module) for module in found.values()})
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and found:
            module.use_nested_tensor = False  # a fused path that reads the weights of the first layer
    return list(found)


def closed_names(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state with the names that `nn.MultiheadAttention` has; attention that holds factors keeps its own."""
    renamed: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, ProjectedAttention):
            whole = {f"{name}.{each}.weight": f"{name}.{each}_weight" for each in (FUSED if module.is_fused else SPLIT)}
            if whole.keys() <= state.keys():
                renamed |= whole
    return {renamed.get(key, key): value for key, value in state.items()}


def _linear(weight: nn.Parameter) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = weight
    return layer


def _rows_of(layer: nn.Linear | BasisLinear, inputs: Tensor, rows: slice) -> Tensor:
    """Some outputs of a projection without a bias."""
    if isinstance(layer, BasisLinear):
        return layer.rows_of(inputs, rows)
    if is_sharded(layer.weight):  # a unit of its own under fully_shard, gathered for its forward alone
        found: Tensor = layer(inputs)[..., rows]
        return found
    return F.linear(inputs, layer.weight[rows])


def _per_head(tokens: Tensor, heads: int, batched: bool, batch_axis: int) -> Tensor:
    """`(B, heads, length, width)` of `(B, length, heads width)`, `(length, B, ...)` or `(length, ...)`."""
    tokens = tokens if batched else tokens[None]
    tokens = tokens if batch_axis == 0 else tokens.transpose(0, 1)
    return tokens.view(*tokens.shape[:2], heads, -1).transpose(1, 2)


def _merged_mask(attn: Tensor | None, padding: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """What is added to scores `(B, heads, queries, keys)`, or None; true in a mask of bools means left out."""
    merged = None
    if attn is not None:
        merged = _additive(attn, query)
        merged = merged if attn.dim() == 2 else merged.view(-1, query.shape[1], *attn.shape[-2:])
        merged = merged.expand(len(query), query.shape[1], query.shape[2], key.shape[2])
    if padding is not None:
        columns = _additive(padding, query).view(len(query), 1, 1, key.shape[2])
        merged = columns.expand(-1, query.shape[1], query.shape[2], -1) if merged is None else merged + columns
    return merged


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))
    return mask.to(like.dtype)
