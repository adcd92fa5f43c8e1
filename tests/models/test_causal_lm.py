"""transformers' language models: loaded whole or refused; adapters that PEFT reads and gives; recomputation."""

from __future__ import annotations

import doctest
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ortho_cli as ortho
from ortho_cli.errors import CheckpointError, UsageError
from ortho_cli.methods.add import insert_lora
from ortho_cli.models.causal_lm import CausalLM, build, build_tiny, byte_tokenizer
from ortho_cli.recipe.instruct import CausalLM as Section
from ortho_cli.recipe.instruct import TinyLM

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # PEFT asks for it


def section(base: Path | str, **keys: Any) -> Section:
    return Section.model_validate({"name": "causal-lm", "base": str(base), **keys})


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    byte_tokenizer().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


IDS = torch.tensor([[1, 19, 20, 3], [1, 7, 8, 9]])


def test_weights_and_tokenizer_are_the_bases(llama: Path) -> None:
    model = build(section(llama)).eval()
    assert isinstance(model, CausalLM)
    peer = transformers.AutoModelForCausalLM.from_pretrained(llama).eval()
    torch.testing.assert_close(model(IDS), peer(IDS).logits)
    assert model.tokenizer("1é").input_ids == [1, 19, 130, 105]
    assert model.notes == []


def test_what_is_held_in_bf16_has_adapters_in_fp32(llama: Path) -> None:
    model = build(section(llama, dtype="bf16"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    before = model(IDS)
    ortho.add_adapter(model, rank=2)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 4
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    torch.testing.assert_close(model(IDS), before, atol=2e-2, rtol=2e-2)
    model(IDS).float().logsumexp(-1).sum().backward()
    assert all(parameter.grad is not None for parameter in trained)


def test_the_meta_form_holds_nothing(llama: Path) -> None:
    with torch.device("meta"):
        model = build(section(llama, quantize="4bit"))
        tiny = build_tiny(TinyLM(name="tiny-lm"))
    for made in (model, tiny):
        assert {parameter.device.type for parameter in made.parameters()} == {"meta"}


def test_the_tiny_one_is_its_seeds() -> None:
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(build_tiny(TinyLM(name="tiny-lm", dim=16, heads=2, depth=1)))
    first, same, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    models[0](IDS).square().sum().backward()
    assert all(parameter.grad is not None for parameter in models[0].parameters())


@pytest.mark.parametrize("what", ["nothing", "no model", "no tokenizer"])
def test_bases_that_do_not_open(what: str, llama: Path, tmp_path: Path) -> None:
    if what == "nothing":
        with pytest.raises(CheckpointError, match="does not open as a causal language model"):
            build(section("nobody/nothing"))
    elif what == "no model":
        config = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        config.save_pretrained(tmp_path / "vit")
        with pytest.raises(CheckpointError, match="does not open as a causal language model"):
            build(section(tmp_path / "vit"))
    else:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (llama / name).unlink(missing_ok=True)
        model = build(section(llama))
        with pytest.raises(CheckpointError, match="has no tokenizer"):
            _ = model.tokenizer


def test_fewer_bits_need_their_library(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs bitsandbytes") as caught:
        build(section(llama, quantize="8bit"))
    assert caught.value.hint == "pip install bitsandbytes"


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_adapters_train_on_weights_in_fewer_bits(bits: str, llama: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = build(section(llama, dtype="bf16", quantize=bits)).train()  # its CPU kernels for inference have no backward
    torch.testing.assert_close(model(IDS).float(), build(section(llama))(IDS), atol=0.1, rtol=0.1)
    ortho.add_adapter(model, rank=2)
    model(IDS).float().logsumexp(-1).sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 4
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match="needs transformers"):
        build_tiny(TinyLM(name="tiny-lm"))


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    model(IDS).float().logsumexp(-1).sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("adapted", [False, True])
def test_recomputed_gradients_are_the_same(adapted: bool, llama: Path) -> None:
    """With a frozen base too, where the first block's input needs no gradient."""
    model = build(section(llama)).train()
    if adapted:
        ortho.add_adapter(model, rank=2)
    plain = gradients(model)
    model.gradient_checkpointing_enable()
    again = gradients(model)
    assert len(plain) == len(again) > 0
    for first, second in zip(plain, again, strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("kind", ["HRA", "LORA"])
def test_adapters_go_to_peft_and_back(kind: str, llama: Path, tmp_path: Path) -> None:
    """Ours in PEFT and PEFT's here, on the same base, with the same logits."""
    peft = pytest.importorskip("peft")

    def base() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(llama).eval()

    def shake(model: torch.nn.Module) -> None:
        torch.manual_seed(3)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter)

    ours = build(section(llama)).eval()
    {"HRA": ortho.add_adapter, "LORA": insert_lora}[kind](ours.model, 4, "auto")
    shake(ours)
    ortho.save_adapter(ours, tmp_path / "ours")
    with torch.no_grad():
        wanted = ours(IDS)
        assert not torch.allclose(wanted, base()(IDS).logits, atol=1e-2)
        theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "ours")
        torch.testing.assert_close(theirs(IDS).logits, wanted, atol=1e-4, rtol=1e-4)
        merged = theirs.merge_and_unload()
        torch.testing.assert_close(merged(IDS).logits, wanted, atol=1e-4, rtol=1e-4)

    config = {"HRA": peft.HRAConfig, "LORA": peft.LoraConfig}[kind](r=4, target_modules=["q_proj", "v_proj"])
    made = peft.get_peft_model(base(), config).eval()
    shake(made)
    made.save_pretrained(tmp_path / "theirs")
    here = build(section(llama)).eval()
    ortho.load_adapter(here, tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(here(IDS), made(IDS).logits, atol=1e-4, rtol=1e-4)


def test_examples_run() -> None:
    found = doctest.testmod(importlib.import_module("ortho_cli.models.causal_lm"))
    assert found.attempted > 0
    assert found.failed == 0
