r"""The products inside attention, :math:`Q_h^T K_h` and :math:`O_h V_h` of every head, to be decayed as products.

What acts in attention are these, not their factors: FNL decays them as it decays factored layers. The attention layers
of a model are found by how its library names their projections.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ortho_cli.errors import TargetError
from ortho_cli.linalg.frobenius import decay_gradients
from ortho_cli.linalg.heads import output_value, output_value_weights, query_key, query_key_weights
from ortho_cli.linalg.product import squared_norm

__all__ = ["AttentionProducts", "attention_products", "skipped_attention"]

# Names of the projections of query, key, value and output below an attention module, by library.
SEPARATE = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("to_q", "to_k", "to_v", "to_out.0"),  # diffusers
    ("q_lin", "k_lin", "v_lin", "out_lin"),  # DistilBERT
    ("q", "k", "v", "o"),  # T5
    ("self.query", "self.key", "self.value", "output.dense"),  # BERT
    ("attention.query", "attention.key", "attention.value", "output.dense"),  # ViT of transformers
)
PACKED = (("qkv", "proj"), ("in_proj_weight", "out_proj"))  # ortho and timm; torch
HEADS = ("num_heads", "heads", "n_heads", "num_attention_heads")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads")


@dataclass(frozen=True, eq=False)
class AttentionProducts:
    """One attention layer: the weights of its projections, and how they fall into heads.

    It is decayed through the same three functions as a factored layer (`FactoredModule`).

    Args:
        weights: of query, key, value and output; or of the first three in one, and output.
        heads: of the queries.
        key_heads: of keys and values.
    """

    weights: tuple[nn.Parameter, ...]
    heads: int
    key_heads: int

    def factor_parameters(self) -> list[nn.Parameter]:
        """The weights."""
        return list(self.weights)

    def squared_norm(self, *parts: Tensor) -> Tensor:
        """The squared norms of all products together."""
        query, key, value, output = _apart(parts)
        scores = squared_norm(*query_key(query, key, self.heads, self.key_heads)).sum()
        return scores + squared_norm(*output_value(output, value, self.heads, self.key_heads)).sum()

    def decay_gradients(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """The gradient of half of it for each weight."""
        query, key, value, output = _apart(parts)
        d_u, d_vt = decay_gradients(*query_key(query, key, self.heads, self.key_heads))
        d_query, d_key = query_key_weights(d_u, d_vt, self.heads)
        d_u, d_vt = decay_gradients(*output_value(output, value, self.heads, self.key_heads))
        d_output, d_value = output_value_weights(d_u, d_vt, self.heads)
        if len(parts) == 2:
            return torch.cat([d_query, d_key, d_value]), d_output
        return d_query, d_key, d_value, d_output


def attention_products(model: nn.Module) -> dict[str, AttentionProducts]:
    """The attention layers of a model by the name of their module; those of `skipped_attention` left out.

    Raises:
        TargetError: there are none; or positions are turned into queries and keys (rotary), so that scores are no
            function of their product.

    >>> list(attention_products(nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})))
    ['attn']
    """
    rotary = next((name for name, module in model.named_modules() if "rotary" in type(module).__name__.lower()), None)
    if rotary is not None:
        raise TargetError(
            f"{rotary} turns queries and keys by their positions, so their product is not what attention scores",
            hint="decay factored layers only: leave attention out",
        )
    found: dict[str, AttentionProducts] = {}
    for name, module, parts in _recognised(model):
        weights = tuple(weight for weight in map(_weight, parts.values()) if isinstance(weight, nn.Parameter))
        if len(weights) == len(parts):
            heads, key_heads = _heads(module, getattr(module, next(iter(parts)).partition(".")[0]))
            found[name] = AttentionProducts(weights, heads, heads if len(weights) == 2 else key_heads)
    if not found:
        why = "".join(f"; {name}: {reason}" for name, reason in list(skipped_attention(model).items())[:1])
        raise TargetError(f"no attention layer is recognised in a {type(model).__name__}{why}")
    return found


def skipped_attention(model: nn.Module) -> dict[str, str]:
    """The attention layers that are recognised but whose projections are no plain weights, each with the reason.

    >>> import ortho_cli as ortho
    >>> model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    >>> _ = ortho.factorize_(model, rank=2, targets=["attn.out_proj"])
    >>> skipped_attention(model)
    {'attn': 'its out_proj is a FactorizedLinear'}
    """
    found = {}
    for name, _, parts in _recognised(model):
        odd = next((part for part, kept in parts.items() if not isinstance(_weight(kept), nn.Parameter)), None)
        if odd is not None:
            found[name] = f"its {odd} is a {type(parts[odd]).__name__}"
    return found


def _recognised(model: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, Any]]]:
    """Modules that have all projections of one library's naming, with these: layers, or weights of the module's own."""
    for name, module in model.named_modules():
        for names in (*SEPARATE, *PACKED):
            parts = {part: _kept(module, part) for part in names}
            if all(isinstance(part, (nn.Module, Tensor)) for part in parts.values()):
                yield name, module, parts
                break


def _kept(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _weight(part: Any) -> Any:
    return part if isinstance(part, Tensor) else getattr(part, "weight", None)


def _heads(*modules: nn.Module) -> tuple[int, int]:
    """Heads of queries and of keys, as the module, what holds its projections, or their configuration says."""
    places: list[Any] = [*modules, *(getattr(module, "config", None) for module in modules)]

    def told(names: tuple[str, ...]) -> int | None:
        values = (getattr(place, name, None) for place in places for name in names)
        return next((value for value in values if type(value) is int), None)

    heads = told(HEADS)
    if heads is None:
        raise TargetError(f"a {type(modules[0]).__name__} does not say how many heads it has")
    return heads, told(KEY_HEADS) or heads


def _apart(parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if len(parts) == 2:
        query, key, value = parts[0].chunk(3)
        return query, key, value, parts[1]
    query, key, value, output = parts
    return query, key, value, output
