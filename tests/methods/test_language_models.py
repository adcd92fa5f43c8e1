"""HRA, LoRA, factors and OIALR on transformers' language models: BERT to T5, GPT-2's transposed layers among them."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import gap, shaken
from pydantic import ValidationError
from text_bases import FAMILIES, config_of
from torch import Tensor, nn

import ortho_cli as ortho
from ortho_cli.methods.adapter_layer import adapter_layers
from ortho_cli.methods.add import insert_hra, insert_lora
from ortho_cli.methods.factorized import FactorizedMethod
from ortho_cli.methods.hra import HRAMethod
from ortho_cli.methods.inject import choose
from ortho_cli.methods.method import Context
from ortho_cli.methods.oialr import OIALRMethod
from ortho_cli.recipe.methods import HRA, OIALR, Factorized

transformers = pytest.importorskip("transformers", reason="the models are transformers' own")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PEFT's own imports warn about packages it looks for
    peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # PEFT asks transformers for it
]

PRESETS = {
    "bert": "bert-all", "roberta": "bert-all", "deberta-v2": "deberta-all", "llama": "llama-all",
    "mistral": "llama-all", "qwen2": "llama-all", "gpt2": "gpt2-all", "t5": "t5-all",
}  # fmt: skip
# Layers of two blocks: by `auto`, and by the preset.
COUNTS = {
    "bert": (4, 12), "roberta": (4, 12), "deberta-v2": (12, 12), "llama": (4, 14), "mistral": (4, 14),
    "qwen2": (4, 14), "gpt2": (2, 8), "t5": (8, 32),
}  # fmt: skip
LINEARS = {"bert": 13, "gpt2": 8, "t5": 33}  # with a pooler, and a head of two layers
INSERT = {"hra": insert_hra, "lora": insert_lora}


def classifier(kind: str) -> nn.Module:
    torch.manual_seed(0)
    changes = {} if FAMILIES[kind].get("pad_token_id", 0) is not None else {"pad_token_id": 0}
    config = config_of(kind, num_labels=3, **changes)
    made: nn.Module = transformers.AutoModelForSequenceClassification.from_config(config)
    return made.eval()


def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(5, 20, (3, 7), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = 1  # where T5 reads
    found: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return found


def weights_merged(model: nn.Module, base: nn.Module) -> nn.Module:
    """The base with each adapted layer's merged weight in it."""
    merged = copy.deepcopy(base)
    with torch.no_grad():
        for name, layer in adapter_layers(model).items():
            merged.get_submodule(name).weight.copy_(layer.merged_weight())
    return merged


@pytest.mark.parametrize("kind", FAMILIES)
def test_auto_and_the_presets_find_every_block(kind: str) -> None:
    model = classifier(kind)
    found = [len(choose(model, "auto")), len(choose(model, [PRESETS[kind]]))]
    assert tuple(found) == COUNTS[kind]


@pytest.mark.parametrize("method", INSERT)
@pytest.mark.parametrize("kind", FAMILIES)
def test_starts_as_the_model_trains_alone_and_merges(kind: str, method: str) -> None:
    base = classifier(kind)
    model = copy.deepcopy(base)
    INSERT[method](model, 4, [PRESETS[kind]])
    assert gap(logits(model), logits(base)) < 1e-5
    logits(shaken(model)).square().sum().backward()
    own = {id(parameter) for layer in adapter_layers(model).values() for parameter in layer.adapter_parameters()}
    assert all((parameter.grad is not None) == (id(parameter) in own) for parameter in model.parameters())
    assert gap(logits(model), logits(base)) > 1e-4
    assert gap(logits(weights_merged(model, base)), logits(model)) < 1e-4


@pytest.mark.parametrize("method", INSERT)
@pytest.mark.parametrize("kind", FAMILIES)
def test_peft_loads_ours(kind: str, method: str, tmp_path: Path) -> None:
    base = classifier(kind)
    model = copy.deepcopy(base)
    INSERT[method](model, 4, [PRESETS[kind]])
    shaken(model)
    model.get_submodule("classifier" if hasattr(model, "classifier") else "score" if hasattr(model, "score") else
                        "classification_head").requires_grad_(True)  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora" not in name and "hra" not in name:
                parameter.add_(0.1)  # the head trained too
    folder = ortho.save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-4)
    ours = ortho.load_adapter(copy.deepcopy(base), folder).eval()
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", INSERT)
@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind not in ("mistral", "qwen2")])
def test_we_load_pefts(kind: str, method: str, tmp_path: Path) -> None:
    if (kind, method) == ("gpt2", "hra"):
        pytest.skip("PEFT's HRA knows no Conv1D")
    base = classifier(kind)
    head = next(name for name in ("classifier", "score", "classification_head") if hasattr(base, name))
    keys: dict[str, Any] = {"r": 4, "target_modules": _names(base), "modules_to_save": [head]}
    if method == "lora":
        keys |= {"fan_in_fan_out": kind == "gpt2", "init_lora_weights": False}
    config = {"hra": peft.HRAConfig, "lora": peft.LoraConfig}[method](**keys)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(tmp_path)
    ours = ortho.load_adapter(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)


def _names(base: nn.Module) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in choose(base, "auto")} - {"dense"})


@pytest.mark.parametrize(("rank", "count"), [(8, 2_097_152), (32, 8_388_608)])
@pytest.mark.parametrize("side", ["input", "output"])
def test_llama_2_7b_on_paper(side: str, rank: int, count: int) -> None:
    """The paper's 64 modules and parameters, without a weight; square projections have as many on either side."""
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
        before = sum(parameter.numel() for parameter in model.parameters())
        names = insert_hra(model, rank, "auto", side=side)
    assert (before, len(names)) == (6_738_415_616, 64)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == count


class TestLlamaVariant:
    """Output-side soft reflections, as HRA's LLaMA experiments have them."""

    EPS = 1e-4

    @staticmethod
    def published(layer: nn.Linear, vectors: Tensor, x: Tensor) -> Tensor:
        """The authors' form: a dense chain of I - 2 v v^T with v = u / sqrt(|u|^2 + eps), on outputs without bias."""
        chain = torch.eye(len(vectors), dtype=x.dtype)
        for u in vectors.T:
            v = u / (u.square().sum() + TestLlamaVariant.EPS).sqrt()
            chain = chain @ (torch.eye(len(u), dtype=x.dtype) - 2 * torch.outer(v, v))
        bias = 0 if layer.bias is None else layer.bias
        return (x @ layer.weight.T) @ chain + bias

    @pytest.mark.parametrize("spread", [0.0, 1e-3, 0.5])
    @pytest.mark.parametrize("rank", [1, 4, 7])
    def test_equals_the_published_form(self, rank: int, spread: float) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 24)).double()
        base = copy.deepcopy(model[0])
        insert_hra(model, rank, ["0"], side="output", eps=self.EPS, start="soft")
        shaken(model, spread)
        x = torch.randn(5, 12, dtype=torch.float64)
        torch.testing.assert_close(model(x), self.published(base, model[0].vectors.detach(), x))

    def test_starts_as_short_as_published(self) -> None:
        """Golden numbers of the authors' start at 4,096 outputs and 8 columns."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1, 4096, bias=False))
        insert_hra(model, 8, ["0"], side="output", eps=self.EPS, start="soft")
        vectors = model[0].vectors.detach().double()
        assert float(vectors.abs().max()) == pytest.approx(8.66e-5, rel=1e-3)
        lengths = vectors.square().sum(0)
        assert float(lengths.mean()) == pytest.approx(1.02e-5, rel=0.03)
        assert float((lengths / (lengths + self.EPS)).mean()) == pytest.approx(0.092, rel=0.03)
        basis = torch.linalg.qr(vectors).Q  # D differs from the identity in the columns' span only
        turned = torch.eye(8, dtype=torch.float64)
        for v in (basis.T @ (vectors / (lengths + self.EPS).sqrt())).T:
            turned = turned - 2 * torch.outer(turned @ v, v)
        assert float((turned - torch.eye(8)).norm()) == pytest.approx(0.52, abs=0.01)
        assert float(torch.linalg.svdvals(turned).min()) == pytest.approx(0.8, abs=0.01)

    def test_recipes_start_there_and_no_other_does(self) -> None:
        section = HRA(name="hra", rank=7, side="output", eps=self.EPS, compat="llama", targets=("0",))
        model = nn.Sequential(nn.Linear(16, 16))
        HRAMethod(section).prepare(model, Context(0, 1, "classify", None))
        assert float(model[0].vectors.detach().abs().max()) < 1e-4
        with pytest.raises(ValidationError, match="llama goes with side: output"):
            HRA(name="hra", compat="llama")
        with pytest.raises(ValueError, match="start 'soft'"):
            insert_hra(nn.Sequential(nn.Linear(4, 4)), 2, ["0"], start="soft")


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_full_rank_factors_are_the_model(kind: str) -> None:
    model = classifier(kind)
    before = logits(model).detach()
    method = FactorizedMethod(Factorized(name="factorized", rank_scale=1.0))
    method.prepare(model, Context(0, 10, "glue", None))
    assert f"{LINEARS[kind]} layers" in " ".join(method.notes)
    assert gap(logits(model), before) < 1e-4


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_oialr_converts_every_block(kind: str) -> None:
    model = classifier(kind)
    method = OIALRMethod(OIALR(name="oialr", when="step", delay=1, every=1, order="all"))
    method.prepare(model, Context(0, 10, "glue", None))
    before = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    for step in range(3):
        optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=1e-4)
        logits(model).square().sum().backward()
        optimizer.step()
        method.after_step(model, optimizer, step, "train")
    assert f"{LINEARS[kind]} of {LINEARS[kind]} layers converted" in method.closing_notes()[0]
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) < before
