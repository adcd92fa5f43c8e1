"""Attention by smaller heads: the paper's counts, the best approximation of each product, and the way back."""

from __future__ import annotations

from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ortho_cli.errors import TargetError, UsageError
from ortho_cli.linalg.heads import output_value, query_key
from ortho_cli.methods.factorized import FactorizedMethod
from ortho_cli.methods.factorized_attention import resizable_attention, shrink_heads_
from ortho_cli.methods.factorized_export import dense_state
from ortho_cli.methods.frobenius_decay import FrobeniusDecayMethod
from ortho_cli.methods.method import Context
from ortho_cli.models.translator import Translator
from ortho_cli.models.translator_attention import Attention
from ortho_cli.models.vit import Block
from ortho_cli.recipe.methods import Factorized, FrobeniusDecay

TARGETS = ["**.fc1", "**.fc2", "**.tokens", "**.positions", "out_embed"]
CONTEXT = Context(0, 1, "translate", None)


def translator(**sizes: int) -> Translator:
    torch.manual_seed(0)
    wanted = {"dim": 16, "hidden": 24, "heads": 2, "depth": 1, **sizes}
    return Translator(20, 24, 0, positions=8, **wanted)  # type: ignore[arg-type]


def method(**settings: Any) -> FactorizedMethod:
    section = {"name": "factorized", "rank_scale": 0.5, "targets": tuple(TARGETS), "attention": True, **settings}
    return FactorizedMethod(Factorized.model_validate(section))


def products(attention: Attention) -> tuple[Tensor, Tensor]:
    """What each head computes with: scores with their scale, and what it writes."""
    weights = [getattr(attention, part).weight for part in ("q_proj", "k_proj", "v_proj", "out_proj")]
    query, key, value, output = weights
    scores = torch.matmul(*query_key(query, key, attention.heads)) / sqrt(len(query) // attention.heads)
    return scores, torch.matmul(*output_value(output, value, attention.heads))


@pytest.mark.parametrize(("scale", "count", "size"), [(0.5, 6_379_280, 32), (0.25, 3_197_712, 16)])
def test_the_papers_counts(scale: float, count: int, size: int) -> None:
    with torch.device("meta"):
        model = Translator(10_000, 10_000, 0, dim=256, hidden=1024, heads=4, depth=2)
        made = method(rank_scale=scale)
        assert len(made.chosen(model)["attention"]) == 6
        made.prepare(model, CONTEXT)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert made.notes[1] == f"6 attention layers with heads of {size}"


def test_a_spectral_start_is_the_best_approximation_of_each_product() -> None:
    model = translator(dim=16, heads=2)
    before = [products(each) for each in resizable_attention(model).values()]
    assert set(shrink_heads_(model, 0.5).values()) == {4}
    for attention, whole in zip(resizable_attention(model).values(), before, strict=True):
        for found, wanted in zip(products(attention), whole, strict=True):
            u, values, v = torch.linalg.svd(wanted)
            best = u[..., :4] * values[:, None, :4] @ v[:, :4]
            torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-5)
        query, key = attention.q_proj.weight, attention.k_proj.weight
        u, vt = query_key(query, key, 2)
        torch.testing.assert_close(u.mT @ u, vt @ vt.mT, rtol=1e-4, atol=1e-5)  # balanced


def test_a_plain_start_is_drawn_from_the_seed() -> None:
    first, same, other = (translator() for _ in range(3))
    for model, seed in ((first, 0), (same, 0), (other, 1)):
        shrink_heads_(model, 0.5, spectral=False, seed=seed)
    weights = [model.get_parameter("decoder.blocks.0.cross.q_proj.weight") for model in (first, same, other)]
    assert weights[0].shape == (8, 16)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert 0.05 < float(weights[0].detach().abs().max()) <= 0.1


@pytest.mark.parametrize("spectral", [True, False])
def test_the_dense_network_computes_the_same(spectral: bool) -> None:
    model, plain = translator().eval(), translator().eval()
    made = method(spectral=spectral)
    made.prepare(model, CONTEXT)
    plain.load_state_dict(dense_state(model))
    source, target = torch.randint(1, 20, (3, 6)), torch.randint(1, 24, (3, 5))
    torch.testing.assert_close(plain(source, target), model(source, target), rtol=1e-4, atol=1e-5)
    assert made.state()["ranks"]["encoder.blocks.0.attention"] == [4]


def test_frobenius_decay_reaches_layers_embeddings_and_both_products() -> None:
    """The gradient is that of the penalty on products, by autograd."""
    model = translator()
    method().prepare(model, CONTEXT)
    section = {"name": "frobenius_decay", "penalty": 0.1, "attention": True, "form": "coupled"}
    decay = FrobeniusDecayMethod(FrobeniusDecay.model_validate(section))
    decay.prepare(model, CONTEXT)
    found: list[Any] = list(decay.layers.values())
    factors = [each.U @ each.VT for each in found if hasattr(each, "U")]
    assert len(factors) == 9  # two embeddings and two feed-forward layers a side, and the output
    attention = [
        torch.matmul(*pair(module, *names)) for module in resizable_attention(model).values() for pair, names in PAIRS
    ]
    penalty = 0.05 * sum(each.square().sum() for each in [*factors, *attention])
    parameters = [parameter for layer in found for parameter in layer.factor_parameters()]
    wanted = torch.autograd.grad(penalty, parameters)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    decay.after_backward(model, optimizer, "train")
    for parameter, gradient in zip(parameters, wanted, strict=True):
        assert gradient.any()
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    assert decay.param_groups(model)[0]["weight_decay"] == 0
    assert len(decay.param_groups(model)[0]["params"]) == len(parameters) == 2 * 9 + 4 * 3


def _pair(module: Attention, first: str, second: str) -> tuple[Tensor, Tensor]:
    weights = getattr(module, first).weight, getattr(module, second).weight
    return query_key(*weights, module.heads) if first == "q_proj" else output_value(*weights, module.heads)


PAIRS = ((_pair, ("q_proj", "k_proj")), (_pair, ("out_proj", "v_proj")))


def test_what_cannot_shrink_says_why() -> None:
    with pytest.raises(TargetError, match="no attention whose heads can become smaller"):
        shrink_heads_(Block(8, 2, 8, True, 0.0), 0.5)
    with pytest.raises(UsageError, match="heads of 0 out of heads of 8"):
        shrink_heads_(translator(), 0.1)
    model = translator()
    model.encoder.blocks[0].attention.q_proj = nn.Identity()
    with pytest.raises(TargetError, match=r"encoder\.blocks\.0\.attention has a Identity"):
        shrink_heads_(model, 0.5)
    with pytest.raises(ValueError, match="takes rank_scale: X below 1"):
        method(rank_scale=None, target_ratio=0.5)
    with pytest.raises(ValueError, match="takes rank_scale: X below 1"):
        method(rank_scale=1.0)
