"""Adapters that PEFT itself wrote: our operators give PEFT's own merged weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft_adapters import CONFIGS, PEFT_SPEAKS, assert_same, make_config, merged_here, trained
from torch import nn

from ortho_cli.checkpoints.adapters import base_bound
from ortho_cli.checkpoints.reading import TensorReader

pytestmark = PEFT_SPEAKS


@pytest.mark.parametrize("name", CONFIGS)
def test_merged_weights_equal_those_of_peft(name: str, tmp_path: Path) -> None:
    adapter, merged, base = trained(tmp_path / "adapter", make_config(name))
    assert adapter.dialect == "peft"
    assert adapter.kind == CONFIGS[name][0].lower()
    assert not base_bound(adapter)
    assert_same(merged_here(adapter, base), merged, base)


def test_what_is_not_a_factor_goes_where_peft_puts_it(tmp_path: Path) -> None:
    adapter, _, _ = trained(tmp_path / "a", make_config("hra all biases, saved module"))
    assert {"classifier.weight", "classifier.bias", "layers.0.q.bias", "norm.bias"} <= adapter.replacements.keys()
    assert "1 tensors of the base's own modules (original_module) are not used" in adapter.notes
    adapter, _, _ = trained(tmp_path / "b", make_config("lora own biases"))
    assert adapter.additions["layers.1.wide.bias"].scale == 6 / 4
    adapter, _, _ = trained(tmp_path / "c", make_config("lora with token rows"))
    rows, info = adapter.row_replacements["embed_tokens.weight"]
    assert rows == (1, 7, 4) and info.shape == (3, 12)


def test_patterns_are_resolved_as_peft_does(tmp_path: Path) -> None:
    adapter, _, _ = trained(tmp_path / "adapter", make_config("rslora with patterns"))
    assert {layer: (kept.rank, kept.options["scale"]) for layer, kept in adapter.layers.items()} == {
        "layers.0.q": (2, 6 / 2**0.5), "layers.1.q": (4, 5 / 2.0),
        "layers.0.wide": (3, 6 / 3**0.5), "layers.1.wide": (3, 5 / 3**0.5),
        "layers.0.conv": (4, 3.0), "layers.1.conv": (4, 2.5),
        "layers.0.point": (4, 3.0), "layers.1.point": (4, 2.5),
    }  # fmt: skip


@pytest.mark.parametrize("use_dora", [False, True])
def test_weights_stored_transposed(use_dora: bool, tmp_path: Path) -> None:
    """GPT-2's Conv1D: `fan_in_fan_out`."""
    import peft
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("c_attn", Conv1D(18, 6))  # type: ignore[no-untyped-call]
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, use_dora=use_dora)
    adapter, merged, base = trained(tmp_path / "adapter", config, model)
    assert adapter.layers["c_attn"].options["transposed"] is True
    assert adapter.layers["c_attn"].expects((6, 18)) is None and adapter.layers["c_attn"].expects((18, 6))
    assert_same(merged_here(adapter, base), merged, base)


def test_initialisations_that_change_the_base_are_bound_to_it(tmp_path: Path) -> None:
    """PiSSA takes U S V out of the weight: on the untouched base the adapter would add it a second time."""
    import peft

    config = peft.LoraConfig(r=2, init_lora_weights="pissa", target_modules=["q"])
    adapter, merged, base = trained(tmp_path / "adapter", config)
    assert base_bound(adapter)
    assert "initialised by pissa, which took a part out of the base: right only on that residual" in adapter.notes
    wrong = merged_here(adapter, base)["layers.0.q.weight"]
    assert torch.linalg.vector_norm(wrong - merged["layers.0.q.weight"]) > 0.1


def test_an_exact_merge_is_computed_in_float64(tmp_path: Path) -> None:
    adapter, _, base = trained(tmp_path / "adapter", make_config("lora"))
    weight = base.state_dict()["layers.0.q.weight"].double()
    merged = adapter.operator("layers.0.q", "float64").apply(weight)
    with TensorReader() as reader:
        factors = adapter.layers["layers.0.q"].tensors
        up, down = (reader.read_copy(factors[role]).double() for role in ("up", "down"))
    torch.testing.assert_close(merged, weight + 1.5 * up @ down, rtol=0, atol=1e-15)
