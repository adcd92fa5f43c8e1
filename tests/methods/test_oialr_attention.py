"""torch's attention opened into layers: the same outputs and weights, every option, then trained at low rank."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import gap
from safetensors.torch import load_file
from torch import Tensor, nn

import ortho_cli as ortho
from ortho_cli.errors import UsageError
from ortho_cli.methods.factorized_export import dense_state, write_exports
from ortho_cli.methods.projected_attention import ProjectedAttention, open_attention

KINDS: dict[str, dict[str, Any]] = {
    "fused": {}, "batch first": {"batch_first": True}, "split": {"kdim": 6, "vdim": 5}, "no bias": {"bias": False},
    "extra keys": {"add_bias_kv": True, "add_zero_attn": True},
}  # fmt: skip
LENGTH, KEYS, BATCH, WIDTH, HEADS = 4, 5, 3, 8, 2


def attention(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    made = nn.MultiheadAttention(WIDTH, HEADS, **options)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made.eval()


def inputs(options: dict[str, Any]) -> list[Tensor]:
    shapes = [
        (LENGTH, BATCH, WIDTH),
        (KEYS, BATCH, options.get("kdim", WIDTH)),
        (KEYS, BATCH, options.get("vdim", WIDTH)),
    ]
    found = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in shapes]
    return [each.transpose(0, 1) for each in found] if options.get("batch_first") else found


def masks() -> list[tuple[Tensor | None, Tensor | None]]:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.rand(LENGTH, KEYS, generator=generator) > 0.7
    padded = torch.rand(BATCH, KEYS, generator=generator) > 0.8
    hidden[:, 0] = padded[:, 0] = False
    added = torch.randn(BATCH * HEADS, LENGTH, KEYS, generator=generator)
    floats = torch.zeros(BATCH, KEYS).masked_fill(padded, float("-inf"))
    return [(None, None), (hidden, None), (None, padded), (hidden, padded), (added, floats), (added, None)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("need_weights", [True, False])
def test_it_is_torchs_attention(kind: str, need_weights: bool) -> None:
    base = attention(**KINDS[kind])
    ours = ProjectedAttention(base)
    assert {id(each) for each in ours.parameters()} == {id(each) for each in base.parameters()}
    for attn_mask, padding in masks():
        for average in (True, False):
            options: dict[str, Any] = {
                "attn_mask": attn_mask, "key_padding_mask": padding, "need_weights": need_weights,
                "average_attn_weights": average,
            }  # fmt: skip
            theirs, found = base(*inputs(KINDS[kind]), **options), ours(*inputs(KINDS[kind]), **options)
            assert gap(found[0], theirs[0]) < 1e-5
            if need_weights:
                assert gap(found[1], theirs[1]) < 1e-5
            else:
                assert found[1] is None


def test_unbatched_and_self_attention() -> None:
    base = attention()
    ours, tokens = ProjectedAttention(base), torch.randn(LENGTH, WIDTH)
    for found, theirs in zip(ours(tokens, tokens, tokens), base(tokens, tokens, tokens), strict=True):
        assert found.shape == theirs.shape and gap(found, theirs) < 1e-5
    with pytest.raises(UsageError, match="no attn_mask"):
        ours(tokens, tokens, tokens, is_causal=True)


class Wrapped(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attn = attention
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, *tokens: Tensor) -> Tensor:
        return self.head(self.attn(*tokens, need_weights=False)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_its_projections_convert_train_and_leave_a_plain_model(kind: str, name: str, tmp_path: Path) -> None:
    model = Wrapped(attention(**KINDS[kind]))
    plain, again = copy.deepcopy(model), copy.deepcopy(model)
    made = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name]
    optimizer = made(model.parameters(), 1e-2)
    run = ortho.oialr(model, optimizer, when="step", delay=2, every=2, order="all", beta=0.3)
    names = ["q_proj", "k_proj", "v_proj"] if kind == "split" else ["in_proj"]
    biases = None if model.attn.in_proj_bias is None else model.attn.in_proj_bias.detach().clone()
    for step in range(6):
        if step == 4 and biases is not None:
            biases = model.attn.in_proj_bias.detach().clone()
        optimizer.zero_grad()
        model(*inputs(KINDS[kind])).square().mean().backward()
        optimizer.step()
        run.step()
    assert sorted(run.converted) == sorted(f"attn.{each}" for each in [*names, "out_proj"])
    assert any(layer.rank < min(layer.form.matrix_shape) for layer in run.converted.values())
    if biases is not None:
        assert not torch.equal(model.attn.in_proj_bias, biases)
    wanted = model.eval()(*inputs(KINDS[kind]))
    plain.load_state_dict(dense_state(model))
    assert gap(plain.eval()(*inputs(KINDS[kind])), wanted) < 1e-5
    write_exports(model, tmp_path / "export")
    ortho.load_factorized(again, tmp_path / "export" / "factors")
    assert gap(again.eval()(*inputs(KINDS[kind])), wanted) < 1e-5
    assert set(load_file(tmp_path / "export/dense/model.safetensors")) == set(plain.state_dict())


def test_torchs_encoder_takes_no_path_around_it() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    plain = copy.deepcopy(model)
    plain.use_nested_tensor = False  # a prototype of torch, which warns
    assert open_attention(model) == ["layers.0.self_attn", "layers.1.self_attn"]
    tokens, padded = torch.randn(3, 5, 16), torch.tensor([[0] * 5, [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]], dtype=torch.bool)
    for grad, mask in itertools.product((True, False), (None, padded)):
        with torch.set_grad_enabled(grad):
            found, theirs = model(tokens, src_key_padding_mask=mask), plain(tokens, src_key_padding_mask=mask)
        kept = torch.ones(3, 5, dtype=torch.bool) if mask is None else ~mask
        assert gap(found[kept], theirs[kept]) < 1e-5
    decoder = nn.TransformerDecoderLayer(16, 4, 32, dropout=0.0, batch_first=True).eval()
    wrapped = nn.Sequential(copy.deepcopy(decoder))
    open_attention(wrapped)
    assert gap(wrapped[0](tokens, tokens.flip(1)), decoder(tokens, tokens.flip(1))) < 1e-5
