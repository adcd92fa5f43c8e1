"""Real MiniLM weights: PEFT loads what we write, and merges what it writes to the numbers we merge it to."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_folders import Tensors, read, relative_error, train
from minilm import SHA256
from safetensors import safe_open
from safetensors.torch import save_file

from ortho_cli.checkpoints.store import open_checkpoint
from ortho_cli.surgery.add_hra import add_hra
from ortho_cli.surgery.convert import convert
from ortho_cli.surgery.merge import merge

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PEFT's own imports warn about packages it looks for
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")

TARGETS = ["query", "value", "output.dense"]  # 384 and 1536 wide
pytestmark = [
    pytest.mark.filterwarnings("ignore:The symmetric initialization can NOT be performed when r is odd"),  # PEFT's own
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),  # PEFT asks transformers for it
]
Model = Any


@pytest.fixture(scope="module")
def folder(minilm_weights: Path) -> Path:
    return minilm_weights


@pytest.fixture(scope="module")
def minilm(folder: Path) -> Model:
    return transformers.AutoModel.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def sentences(folder: Path) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer(["cat", "kitten", "The bank raised its interest rates."], padding=True, return_tensors="pt")


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    """Room for merged models of 90 MB, emptied at once."""
    yield tmp_path
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()


def states(model: Model, sentences: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**sentences).last_hidden_state.clone()


def similarities(model: Model, sentences: Any) -> torch.Tensor:
    """Cosines of mean-pooled sentences, as sentence-transformers defines them for this model."""
    mask = sentences["attention_mask"].unsqueeze(-1)
    pooled = (states(model, sentences) * mask).sum(1) / mask.sum(1)
    unit = torch.nn.functional.normalize(pooled, dim=1)
    return unit @ unit.T


def adapted(model: Model, config: Any, folder: Path) -> Model:
    """PEFT's adapter on a copy of a model, every trained number moved, saved to a folder."""
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    wrapped.save_pretrained(folder)
    return wrapped.eval()


def agree(path: Path, wrapped: Model, base: Tensors) -> None:
    """Our merged file against PEFT's merged model: 1e-5 on what changed, equality on the rest."""
    theirs = wrapped.merge_and_unload().state_dict()
    changed = 0
    with safe_open(path, "pt") as ours:
        for name in ours.keys():  # noqa: SIM118
            if name not in theirs:
                assert name.endswith("position_ids")
                continue
            tensor = ours.get_tensor(name)
            if torch.equal(theirs[name], base[name]):
                assert torch.equal(tensor, base[name])
            else:
                assert relative_error(tensor, theirs[name]) < 1e-5, name
                assert relative_error(tensor, base[name]) > 1e-3, name
                changed += 1
    assert changed, "the adapter did nothing"


CONFIGS: dict[str, Callable[[], Any]] = {
    **{f"hra-{rank}": lambda rank=rank: peft.HRAConfig(r=rank, target_modules=TARGETS) for rank in (2, 5, 8, 32)},
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS),
    "rslora": lambda: peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=TARGETS),
    "oft-cayley": lambda: peft.OFTConfig(oft_block_size=32, use_cayley_neumann=False, target_modules=TARGETS),
    "oft-neumann": lambda: peft.OFTConfig(oft_block_size=32, use_cayley_neumann=True, target_modules=TARGETS),
}


def test_the_weights_are_the_published_ones(folder: Path) -> None:
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == SHA256
    checkpoint = open_checkpoint(folder)
    numbers = sum(info.numel for info in checkpoint.tensors.values() if info.dtype == "F32")
    assert (len(checkpoint.tensors), numbers) == (104, 22_713_216)


@pytest.mark.parametrize("gram_schmidt", [False, True])
def test_our_adapter_loads_and_is_the_identity(
    folder: Path, minilm: Model, sentences: Any, work: Path, gram_schmidt: bool
) -> None:
    report = add_hra(folder, work / "hra", targets=["query", "value"], gram_schmidt=gram_schmidt)
    assert report.parameters == 36_864 * (2 if gram_schmidt else 1)
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(minilm), work / "hra").eval()
    loaded = peft.get_peft_model_state_dict(wrapped)
    written = read(work / "hra")
    assert loaded.keys() == written.keys()
    assert all(torch.equal(loaded[name], written[name]) for name in written)
    assert relative_error(states(wrapped, sentences), states(minilm, sentences)) < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_adapters_merge_to_pefts_numbers(folder: Path, minilm: Model, work: Path, name: str) -> None:
    wrapped = adapted(minilm, CONFIGS[name](), work / "adapter")
    report = merge(folder, [work / "adapter"], work / "merged.safetensors")
    assert report.layers == 6 * 4  # query, value, and two modules that end in output.dense
    agree(work / "merged.safetensors", wrapped, minilm.state_dict())


@pytest.mark.parametrize("rank", [5, 8])
def test_hra_as_a_lora_gives_the_same_outputs(
    folder: Path, minilm: Model, sentences: Any, work: Path, rank: int
) -> None:
    wrapped = adapted(minilm, peft.HRAConfig(r=rank, target_modules=TARGETS), work / "hra")
    convert(work / "hra", work / "lora", "peft-lora", base=str(folder))
    as_lora = peft.PeftModel.from_pretrained(copy.deepcopy(minilm), work / "lora").eval()
    assert as_lora.peft_config["default"].peft_type == "LORA"
    assert as_lora.peft_config["default"].lora_alpha == as_lora.peft_config["default"].r == rank
    wanted = states(wrapped, sentences)
    assert relative_error(states(as_lora, sentences), wanted) < 1e-5
    assert relative_error(states(minilm, sentences), wanted) > 1e-2


def test_our_gram_schmidt_adapter_trained_means_the_same_to_peft(
    folder: Path, minilm: Model, sentences: Any, work: Path
) -> None:
    add_hra(folder, work / "hra", targets=TARGETS, rank=[4, "query=8"], gram_schmidt=True)
    train(work / "hra", amount=0.2)
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(minilm), work / "hra").eval()
    merge(folder, [work / "hra"], work / "merged")
    merged = transformers.AutoModel.from_pretrained(work / "merged").eval()
    assert relative_error(states(merged, sentences), states(wrapped, sentences)) < 1e-5
    assert relative_error(states(merged, sentences), states(minilm, sentences)) > 1e-2


def test_a_merged_model_keeps_its_sentences(folder: Path, minilm: Model, sentences: Any, work: Path) -> None:
    add_hra(folder, work / "hra", targets=["all-linear"])
    report = merge(folder, [work / "hra"], work / "merged")
    assert report.layers == 6 * 6 + 1
    assert max(detail["relative_change"] for detail in report.details) < 1e-6
    merged = transformers.AutoModel.from_pretrained(work / "merged").eval()
    before, after = similarities(minilm, sentences), similarities(merged, sentences)
    assert torch.allclose(before, after, atol=1e-5)
    assert after[0].tolist() == pytest.approx([1.0, 0.788, 0.079], abs=2e-3)  # cat: itself, kitten, interest rates
    assert (work / "merged" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


class Convolutions(torch.nn.Module):
    """PEFT adapts square kernels without groups; here one of each size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(32, 64, 3, padding=1)
        self.point = torch.nn.Conv2d(64, 32, 1)
        self.norm = torch.nn.GroupNorm(4, 32)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(self.point(self.conv(image).relu()))
        return result


class TestConvolutions:
    @pytest.fixture
    def base(self, tmp_path: Path) -> Path:
        save_file(Convolutions().state_dict(), tmp_path / "convs.safetensors")
        return tmp_path / "convs.safetensors"

    @pytest.mark.parametrize("name", CONFIGS)
    def test_merge_to_pefts_numbers(self, base: Path, tmp_path: Path, name: str) -> None:
        config = CONFIGS[name]()
        config.target_modules = {"conv", "point"}
        wrapped = adapted(Convolutions(), config, tmp_path / "adapter")
        merge(base, [tmp_path / "adapter"], tmp_path / "merged.safetensors")
        agree(tmp_path / "merged.safetensors", wrapped, Convolutions().state_dict())

    @pytest.mark.parametrize("gram_schmidt", [False, True])
    def test_our_adapter_and_its_lora_load(self, base: Path, tmp_path: Path, gram_schmidt: bool) -> None:
        image = torch.randn(2, 32, 6, 6, generator=torch.Generator().manual_seed(1))
        add_hra(base, tmp_path / "hra", targets=["conv", "point"], rank=4, gram_schmidt=gram_schmidt)
        wanted = Convolutions()(image)
        assert relative_error(self.load(tmp_path / "hra")(image), wanted) < 1e-5
        train(tmp_path / "hra")
        convert(tmp_path / "hra", tmp_path / "lora", "peft-lora", base=str(base))
        turned = self.load(tmp_path / "hra")(image)
        assert relative_error(turned, wanted) > 1e-2
        assert relative_error(self.load(tmp_path / "lora")(image), turned) < 1e-5

    def load(self, folder: Path) -> Model:
        return peft.PeftModel.from_pretrained(Convolutions(), folder)
