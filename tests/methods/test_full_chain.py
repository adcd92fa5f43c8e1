"""add-hra, train, merge, convert to LoRA: one adapter from end to end, never two, and the same outputs throughout."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import gap
from torch import Tensor, nn

import ortho_cli as ortho
from ortho_cli.methods.adapter_layer import AdapterLayer, adapter_layers
from ortho_cli.methods.hra_layer import HRALayer
from ortho_cli.methods.lora_layer import LoRALayer
from ortho_cli.recipe.train import load_train
from ortho_cli.training.evaluate import restore_for_judging
from ortho_cli.training.run import train
from ortho_cli.training.session import open_session
from ortho_cli.training.state import last_checkpoint

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PEFT's own imports warn about packages it looks for
    peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks transformers

TARGETS = ["**.query", "**.value", "**.q_proj", "**.v_proj"]
LAYERS, RANK = 4, 4
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision transformer of two blocks, as transformers saves it."""
    folder = tmp_path_factory.mktemp("base") / "vit"
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        num_labels=10,
    )  # fmt: skip
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    return folder


def recipe(path: Path, base: Path, method: str) -> Any:
    path.write_text(
        f"version: 1\ntask: {{name: classify}}\nmodel: {{name: hf-image, base: {base}}}\n"
        "data: {name: digits, batch: 32}\n"
        f"methods: [{method}]\n"
        "optimizer: {name: adamw, lr: 3e-2}\n"
        f"train: {{epochs: 1, limit_batches: 6, threads: 1}}\nrun: {{dir: {path.with_suffix('')}}}\n",
        "utf-8",
    )
    return load_train(path)


def pictures() -> Tensor:
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def opened(folder: Path) -> Any:
    return transformers.AutoModelForImageClassification.from_pretrained(folder).eval()


def outputs(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(pixel_values=pictures()).logits
    return found


def one_adapter_each(model: nn.Module, kind: type[AdapterLayer]) -> None:
    layers = adapter_layers(model)
    assert len(layers) == LAYERS == sum(isinstance(module, AdapterLayer) for module in model.modules())
    assert all(isinstance(layer, kind) and layer.rank == RANK for layer in layers.values())


@pytest.mark.parametrize("form", ["adapter", "checkpoint"])
@pytest.mark.parametrize("gram_schmidt", [False, True], ids=["plain", "gram-schmidt"])
def test_add_train_merge_convert(base: Path, form: str, gram_schmidt: bool, tmp_path: Path) -> None:
    before = outputs(opened(base))
    targets = [pattern for pattern in TARGETS if any(_matches(base, pattern))]
    added = tmp_path / "added"
    ortho.add_hra(base, added, rank=RANK, targets=targets, form=form, gram_schmidt=gram_schmidt)

    # Train: the adapter goes on in the form that add-hra wrote; nothing of it is said again.
    method = f"{{name: hra, adapter: {added}}}" if form == "adapter" else "{name: hra}"
    resolved = recipe(tmp_path / "run.yaml", base if form == "adapter" else added, method)
    start = open_session(resolved)
    one_adapter_each(start.model, HRALayer)
    assert gap(outputs(start.model.model), before) < TOLERANCE  # the identity, whoever wrote it
    outcome = train(resolved)
    assert outcome.step == 6 and outcome.trainable == LAYERS * RANK * 16
    trained = open_session(resolved)
    newest = last_checkpoint(tmp_path / "run")
    assert newest is not None
    restore_for_judging(trained, newest)
    one_adapter_each(trained.model, HRALayer)
    wanted = outputs(trained.model.model)
    assert gap(wanted, before) > 1e-2

    # The run's export on the plain base: here, and in PEFT.
    (exported,) = (tmp_path / "run" / "export").iterdir()
    again = ortho.load_adapter(opened(base), exported)
    one_adapter_each(again, HRALayer)
    assert gap(outputs(again), wanted) < TOLERANCE
    assert gap(outputs(peft.PeftModel.from_pretrained(opened(base), exported)), wanted) < TOLERANCE

    # Merged into the base, no adapter is left.
    ortho.merge(base, exported, tmp_path / "merged")
    dense = ortho.open_checkpoint(tmp_path / "merged")
    assert set(dense.tensors) == set(ortho.open_checkpoint(base).tensors)
    assert gap(outputs(opened(tmp_path / "merged")), wanted) < TOLERANCE

    # As LoRA: exactly as many ranks as the reflections have, on the same layers.
    ortho.convert(exported, tmp_path / "lora", "peft-lora", base=base)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == (2 * RANK if gram_schmidt else RANK)  # the frozen start and what trained
    assert gap(outputs(peft.PeftModel.from_pretrained(opened(base), tmp_path / "lora")), wanted) < TOLERANCE
    lora = ortho.load_adapter(opened(base), tmp_path / "lora")
    assert {type(layer) for layer in adapter_layers(lora).values()} == {LoRALayer}
    assert gap(outputs(lora), wanted) < TOLERANCE
    ortho.merge(base, tmp_path / "lora", tmp_path / "merged-lora")
    assert gap(outputs(opened(tmp_path / "merged-lora")), wanted) < TOLERANCE


def _matches(base: Path, pattern: str) -> list[bool]:
    end = pattern.removeprefix("**.")
    return [name.endswith(f".{end}.weight") for name in ortho.open_checkpoint(base).tensors]
