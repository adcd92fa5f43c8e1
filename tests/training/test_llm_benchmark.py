"""`ortho bench llm` compares adapters on the same weights that give the same numbers; speed is its output, no test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from text_bases import save_base
from torch import nn
from typer.testing import CliRunner

from ortho_cli.cli.app import app
from ortho_cli.errors import NumericsError, UsageError
from ortho_cli.training import llm_benchmark
from ortho_cli.training.llm_benchmark import HRA, LORA, PEERS, measure_llm

pytest.importorskip("transformers", reason="the models are transformers' own")
pytest.importorskip("peft", reason="the peers")
TINY: dict[str, int] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40,
}  # fmt: skip
SHORT: dict[str, Any] = {"batch": 2, "length": 12, "rank": 4, "rounds": 4}
runner = CliRunner()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_adapter_is_timed_on_the_same_layers(dtype: str) -> None:
    found = {each.name: each for each in measure_llm(sizes=TINY, dtype=dtype, **SHORT)}
    assert list(found) == [HRA, LORA, *PEERS]
    layers = 4  # query and value of two blocks
    trained = {name: each.trained for name, each in found.items()}
    assert trained[HRA] == trained[PEERS[1]] == layers * 32 * 4
    assert trained[LORA] == trained[PEERS[0]] == layers * (32 + 32) * 4
    assert trained[PEERS[2]] == layers * 32 * 31 // 2
    for name, each in found.items():
        assert len(each.seconds) == (3 if name == PEERS[1] else 4)
        assert (each.tokens, each.peak_bytes) == (24, None)
        assert each.kept_bytes > 0
        assert each.ratio == pytest.approx(found[PEERS[0]].median / each.median)
    assert found[PEERS[0]].ratio == found[PEERS[0]].kept_ratio == 1
    assert found[HRA].kept_ratio < found[PEERS[1]].kept_ratio


def test_weights_are_in_memory_once_and_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, nn.Module] = {}
    plain = llm_benchmark._adapted
    monkeypatch.setattr(llm_benchmark, "_adapted", lambda *given: seen.update(plain(*given)) or seen)
    measure_llm(sizes=TINY, **SHORT)
    weights = [{p.data_ptr() for p in model.parameters() if not p.requires_grad} for model in seen.values()]
    assert all(each == weights[0] for each in weights)
    torch.manual_seed(0)
    again = llm_benchmark._model(None, TINY, torch.float32)
    frozen = [p for p in seen[HRA].parameters() if not p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(frozen, again.parameters(), strict=True))


def test_an_adapter_that_computes_something_else_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(model: nn.Module, rank: int, names: list[str]) -> None:
        llm_benchmark_insert(model, rank, names, side="output")

    llm_benchmark_insert = llm_benchmark.insert_hra
    monkeypatch.setattr(llm_benchmark, "insert_hra", other)
    with pytest.raises(NumericsError, match="logits of our HRA and of PEFT's differ"):
        measure_llm(sizes=TINY, **SHORT)


def test_a_given_model_and_recomputed_activations(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen2", "AutoModelForCausalLM")
    plain, less = (measure_llm(str(base), checkpointing=each, **SHORT)[0] for each in (False, True))
    assert less.kept_bytes < plain.kept_bytes
    with pytest.raises(UsageError, match="sizes of its own"):
        measure_llm(str(base), sizes=TINY)


def test_sizes_that_no_llama_has() -> None:
    with pytest.raises(UsageError, match="no LLaMA has such sizes: RoPE requires an even rotary dimension"):
        measure_llm(sizes={"hidden_size": 100}, **SHORT)


def test_without_peft_ours_stand_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_benchmark, "find_spec", lambda name: None)
    found = measure_llm(sizes=TINY, **SHORT)
    assert [each.name for each in found] == [HRA, LORA]
    assert found[1].ratio == 1


def test_the_command() -> None:
    words = [f"--config={name}={size}" for name, size in TINY.items()]
    done = runner.invoke(app, ["bench", "llm", *words, "--length", "12", "--rounds", "1", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["command"], found["config"], len(found["details"])) == ("bench llm", TINY, 5)
    assert found["details"][0]["tokens_per_second"] > 0
    table = runner.invoke(app, ["bench", "llm", *words, "--length", "12", "--rounds", "1"])
    assert table.exit_code == 0 and "OFT (PEFT)" in table.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "hidden_size"], "expected NAME=N"),
        (["--config", "hidden=8"], "LlamaConfig has no 'hidden'"),
        (["--rank", "3"], "rank 3 is odd"),
        (["--dtype", "fp8"], "fp8"),
        (["--device", "abacus"], "is not here"),
    ],
)
def test_what_is_refused(words: list[str], message: str) -> None:
    done = runner.invoke(app, ["bench", "llm", *words])
    assert done.exit_code == 2
    assert message in done.output
