"""Attention decayed head by head: every library's naming, the paper's fixture, and autograd of the products."""

from __future__ import annotations

import doctest
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ortho_cli as ortho
from ortho_cli.errors import TargetError
from ortho_cli.methods.attention_products import AttentionProducts, attention_products
from ortho_cli.methods.frobenius_decay import FrobeniusDecayMethod
from ortho_cli.methods.method import Context
from ortho_cli.models.vit import VisionTransformer
from ortho_cli.recipe.methods import FrobeniusDecay


@pytest.mark.parametrize(
    ("heads", "d_query", "d_key"),
    [
        (1, [[2.0, 2.0, 6.0], [2.0, 5.0, 9.0]], [[9.0, 5.0, 2.0], [6.0, 2.0, 2.0]]),
        (2, [[2.0, 0.0, 4.0], [0.0, 5.0, 5.0]], [[5.0, 5.0, 0.0], [4.0, 0.0, 2.0]]),
    ],
)
def test_the_papers_fixture(heads: int, d_query: list[list[float]], d_key: list[list[float]]) -> None:
    query = nn.Parameter(torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]]))
    key = nn.Parameter(torch.tensor([[1.0, 1.0, 0.0], [2.0, 0.0, 1.0]]))
    rest = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(3, 2))
    found = AttentionProducts((query, key, *rest), heads, heads).decay_gradients(query, key, *rest)
    assert found[0].tolist() == d_query
    assert found[1].tolist() == d_key


def naive(query: Tensor, key: Tensor, value: Tensor, output: Tensor, heads: int, key_heads: int) -> Tensor:
    """The definition, head by head."""
    size = query.shape[0] // heads
    total = torch.zeros((), dtype=query.dtype)
    for head in range(heads):
        shared = slice((head // (heads // key_heads)) * size, (head // (heads // key_heads) + 1) * size)
        own = slice(head * size, (head + 1) * size)
        total = total + (query[own].T @ key[shared]).square().sum() + (output[:, own] @ value[shared]).square().sum()
    return total


def transformer() -> VisionTransformer:
    return VisionTransformer(5, 1, 8, patch=4, depth=2, heads=2, dim=8)


class Grouped(nn.Module):
    """Queries of four heads, keys and values of two."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads = 4, 2
        self.q_proj, self.k_proj = nn.Linear(6, 8), nn.Linear(6, 4)
        self.v_proj, self.o_proj = nn.Linear(6, 4), nn.Linear(8, 6)


def attentions() -> list[tuple[nn.Module, int, int]]:
    from diffusers.models.attention_processor import Attention
    from transformers import BertConfig, DistilBertConfig, DistilBertModel, T5Config
    from transformers.models.bert.modeling_bert import BertAttention
    from transformers.models.t5.modeling_t5 import T5Attention

    small: dict[str, Any] = {"hidden_size": 8, "num_attention_heads": 2}
    distilled = DistilBertModel(DistilBertConfig(vocab_size=9, dim=8, n_heads=2, n_layers=1, hidden_dim=8))
    return [
        (nn.MultiheadAttention(8, 2), 2, 2),
        (transformer().get_submodule("blocks.0.attn"), 2, 2),
        (Grouped(), 4, 2),
        (Attention(8, heads=2, dim_head=4), 2, 2),
        (BertAttention(BertConfig(**small, attn_implementation="eager")), 2, 2),
        (distilled.get_submodule("transformer.layer.0.attention"), 2, 2),
        (T5Attention(T5Config(d_model=8, d_kv=4, num_heads=2)), 2, 2),
    ]


@pytest.mark.parametrize("which", range(7))
def test_the_gradient_is_that_of_half_the_squared_products(which: int) -> None:
    module, heads, key_heads = attentions()[which]
    model = nn.ModuleDict({"attention": module}).double()
    found = attention_products(model)
    assert list(found) == ["attention"]
    products = found["attention"]
    assert (products.heads, products.key_heads) == (heads, key_heads)
    parts = products.factor_parameters()
    with torch.no_grad():
        for part in parts:
            part.normal_()
    query, key, value = parts[0].chunk(3) if len(parts) == 2 else parts[:3]
    expected = naive(query, key, value, parts[-1], heads, key_heads)
    assert products.squared_norm(*parts).item() == pytest.approx(expected.item(), rel=1e-9)
    gradients = torch.autograd.grad(expected / 2, parts)
    ortho.frobenius_decay_([products], 0.3)
    for part, gradient in zip(parts, gradients, strict=True):
        assert part.grad is not None
        assert torch.allclose(part.grad, 0.3 * gradient)


def test_the_method_takes_attention_beside_factored_layers_or_alone() -> None:
    context = Context(0, 1, "classify", None)
    for factored in (False, True):
        model = transformer()
        if factored:
            ortho.factorize_(model, rank=2, targets=["fc1"])
        method = FrobeniusDecayMethod(FrobeniusDecay(name="frobenius_decay", attention=True))
        method.prepare(model, context)
        assert len(method.layers) == 2 + 2 * factored
        (group,) = method.param_groups(model)
        assert {id(p) for p in group["params"]} >= {id(block.attn.qkv.weight) for block in model.blocks}
        assert method.scalars()["penalty"] > 0


@pytest.mark.parametrize("which", range(7))
def test_attention_that_is_factored_is_skipped_and_told(which: int) -> None:
    context, whole, factored = Context(0, 1, "classify", None), attentions()[which][0], attentions()[which][0]
    model = nn.ModuleDict({"whole": whole, "factored": factored})
    *_, last = (name for name, module in model.named_modules() if name[:4] == "fact" and isinstance(module, nn.Linear))
    ortho.factorize_(model, rank=2, targets=[last])
    method = FrobeniusDecayMethod(FrobeniusDecay(name="frobenius_decay", attention=True))
    method.prepare(model, context)
    assert list(attention_products(model)) == ["whole"]
    reason = f"its {last.removeprefix('factored.')} is a FactorizedLinear"
    assert method.notes[2:] == [f"does not decay 1 attention layers head by head, first factored: {reason}"]
    del model["whole"]
    with pytest.raises(TargetError, match=f"no attention layer is recognised in a ModuleDict; factored: {reason}"):
        attention_products(model)


def test_what_is_not_recognised() -> None:
    with pytest.raises(TargetError, match="no attention layer is recognised"):
        attention_products(nn.Linear(2, 2))

    class RotaryEmbedding(nn.Module):
        pass

    with pytest.raises(TargetError, match="1 turns queries and keys by their positions"):
        attention_products(nn.Sequential(nn.MultiheadAttention(8, 2), RotaryEmbedding()))
    silent = Grouped()
    del silent.num_heads
    with pytest.raises(TargetError, match="does not say how many heads"):
        attention_products(silent)


def test_examples_in_the_documentation_run() -> None:
    assert doctest.testmod(importlib.import_module("ortho_cli.methods.attention_products")).failed == 0
