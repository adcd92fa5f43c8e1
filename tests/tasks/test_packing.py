"""Samples that share a row: none lost, none seeing another, and the loss of unpacked ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ortho_cli.models.causal_lm import CausalLM, packed_mask
from ortho_cli.tasks.packing import packed_rows
from ortho_cli.tasks.token_rows import IGNORED, Sample, TokenRows

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES = {
    "llama": ("LlamaConfig", {**SMALL, "intermediate_size": 24}),
    "qwen": ("Qwen2Config", {**SMALL, "intermediate_size": 24, "num_key_value_heads": 1}),
    "mistral": ("MistralConfig", {**SMALL, "intermediate_size": 24, "num_key_value_heads": 1}),
    "gpt2": ("GPT2Config", {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}),
}


@given(st.lists(st.integers(1, 20), max_size=40))
def test_each_sample_has_its_place(lengths: list[int]) -> None:
    rows = packed_rows(lengths, 20)
    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
    assert all(sum(lengths[place] for place in row) <= 20 for row in rows)
    assert len(rows) <= -(-11 * -(-sum(lengths) // 20) // 9) + max(1, len(lengths) // 2)
    assert packed_rows(lengths, 20) == rows


def test_a_sample_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="21 tokens"):
        packed_rows([3, 21], 20)


def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    return [
        Sample(torch.randint(3, 32, (length,), generator=generator, dtype=torch.int32), start)
        for length, start in ((7, 3), (5, 2), (9, 0), (4, 1), (6, 6), (3, 1))
    ]


def loss_sum(model: CausalLM, rows: TokenRows) -> tuple[float, int]:
    batch = rows.fetch(0, torch.arange(len(rows)))
    logits = model(batch["input_ids"], batch.get("position_ids"))
    labels = batch["labels"][:, 1:]
    total = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return float(total), int((labels != IGNORED).sum())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_equals_unpacked(family: str, attention: str) -> None:
    """The same loss to rounding; and not by chance: without the mask, neighbours are seen and it differs."""
    torch.manual_seed(0)
    name, sizes = FAMILIES[family]
    config = getattr(transformers, name)(**sizes)
    inner = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model = CausalLM(inner.eval(), None)
    apart, together = TokenRows(samples(), 0), TokenRows(samples(), 0, 16)
    assert len(together) == 3 < len(apart)
    with torch.no_grad():
        first, count = loss_sum(model, apart)
        second, same = loss_sum(model, together)
        batch = together.fetch(0, torch.arange(3))
        seen = model(batch["input_ids"])
        assert not torch.allclose(seen, model(batch["input_ids"], batch["position_ids"]), atol=1e-3)
    assert count == same == int(apart.learnt.sum()) == int(together.learnt.sum())
    assert second == pytest.approx(first, rel=1e-5)


def test_nobody_sees_a_neighbour_or_padding() -> None:
    rows = TokenRows(samples(), 0, 16)
    batch = rows.fetch(0, torch.arange(len(rows)))
    mask = packed_mask(batch["position_ids"])[:, 0]
    assert mask.diagonal(dim1=1, dim2=2).all()  # no row of the mask is empty, which would be NaN
    assert (mask.sum(-1) == batch["position_ids"] + 1).all()  # a sample's own past, and nothing else


def test_padding_is_neither_learnt_nor_counted() -> None:
    rows = TokenRows(samples(), 1)
    batch = rows.fetch(0, torch.tensor([2, 5]))
    assert batch["input_ids"].shape == (2, 9)
    assert batch["labels"][1].tolist()[3:] == [IGNORED] * 6
    assert batch["labels"][0, 0] == IGNORED  # nothing stands before the first token
    assert rows.learnt.tolist() == [4, 3, 8, 3, 0, 2]
    assert rows.fetch(0, torch.tensor([], dtype=torch.long))["input_ids"].shape == (0, 1)
    assert torch.equal(rows[(0, 5)]["input_ids"], rows.samples[5].ids.long())
