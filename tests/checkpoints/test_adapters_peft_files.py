"""PEFT folders as files: where things are found, what is refused, and the HRA authors' LLaMA variant."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_adapters import PEFT_SPEAKS, edit, make_config, trained

from ortho_cli.checkpoints.adapters import read_adapter
from ortho_cli.checkpoints.reading import TensorReader
from ortho_cli.errors import CheckpointError

pytestmark = PEFT_SPEAKS


def test_pipeline_folders_are_read_as_one_adapter(tmp_path: Path) -> None:
    for component in ("unet", "text_encoder"):
        trained(tmp_path / "both" / component, make_config("hra biases"))
    adapter = read_adapter(tmp_path / "both")
    assert (adapter.dialect, adapter.kind, len(adapter.layers)) == ("peft", "hra", 16)
    assert "unet.layers.0.q" in adapter.layers and "text_encoder.layers.1.conv.bias" in adapter.replacements
    assert adapter.config["unet"]["peft_type"] == "HRA"
    assert adapter.operator("unet.layers.0.q").rank == 2


def test_a_weight_file_finds_its_configuration(tmp_path: Path) -> None:
    adapter, _, _ = trained(tmp_path, make_config("hra"))
    named = read_adapter(tmp_path / "adapter_model.safetensors")
    assert named.layers == adapter.layers
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"PEFT tensors without adapter_config.json"):
        read_adapter(tmp_path / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def lora_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft") / "lora"
    trained(folder, make_config("lora"))
    return folder


@pytest.fixture
def lora(lora_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(lora_folder, tmp_path / "lora"))


def only(tensors: dict[str, torch.Tensor]) -> Callable[[dict[str, Any]], None]:
    """An edit that leaves nothing but `tensors`."""

    def replace(content: dict[str, Any]) -> None:
        content.clear()
        content.update(tensors)

    return replace


REFUSALS: dict[str, tuple[Callable[[dict[str, Any]], None] | None, dict[str, Any], str]] = {
    "other type": (None, {"peft_type": "VERA"}, "PEFT adapters of type VERA are not read"),
    "activated lora": (None, {"alora_invocation_tokens": [1, 2]}, "aLoRA acts on some tokens only"),
    "wrong rank": (None, {"r": 8}, "its configuration says rank 8"),
    "rank is text": (None, {"r": "4"}, "configuration field r is '4', a number was expected"),
    "absurd alpha": (None, {"lora_alpha": 10**400}, "configuration field lora_alpha is '10+', a number was expected"),
    "rank zero": (None, {"r": 0}, "its configuration says rank 0"),
    "modules as text": (
        lambda t: t.update({"base_model.model.norm.weight": torch.ones(2)}), {"modules_to_save": "weight"},
        "modules_to_save is 'weight', a list was expected",
    ),
    "same factor twice": (
        lambda t: t.update({"base_model.model.layers.0.q.lora_B.default.weight": torch.ones(20, 4)}), {},
        "are the same factor",
    ),
    "rows without indices": (
        lambda t: t.update({"base_model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 12)}),
        {"trainable_token_indices": {"wte": [1, 2]}}, "has no list of rows for 'embed_tokens'",
    ),
    "bad pattern": (None, {"rank_pattern": {"(": 3}}, "is no regular expression"),
    "dora without magnitudes": (None, {"use_dora": True}, "of a DoRA adapter has no lora_magnitude_vector"),
    "lost factor": (
        lambda t: t.pop("base_model.model.layers.0.q.lora_B.weight"), {}, "'layers.0.q' .lora. lacks .* 'up'",
    ),
    "unknown factor": (
        lambda t: t.update({"base_model.model.layers.0.q.lora_C.weight": torch.ones(2)}), {},
        "unknown tensor 'base_model.model.layers.0.q.lora_C.weight'",
    ),
    "module nobody asked to save": (
        lambda t: t.update({"base_model.model.norm.weight": torch.ones(2)}), {}, "unknown tensor '.*norm.weight'",
    ),
    "integers": (
        lambda t: t.update({"base_model.model.layers.0.q.lora_B.weight": torch.ones(20, 4, dtype=torch.int32)}), {},
        "is I32, an adapter's must be floats",
    ),
    "factors that do not multiply": (
        lambda t: t.update({"base_model.model.layers.0.q.lora_B.weight": torch.ones(20, 3)}), {}, "do not multiply",
    ),
    "old oft": (
        only({"base_model.model.q.oft_r": torch.ones(2, 4, 4)}), {"peft_type": "OFT"},
        "an OFT adapter of PEFT before 0.16",
    ),
    "butterflies": (
        only({"base_model.model.q.boft_R": torch.ones(2, 3, 4, 4), "base_model.model.q.boft_s": torch.ones(20, 1)}),
        {"peft_type": "BOFT"}, "2 butterfly factors; only one",
    ),
    "no skew size": (
        only({"base_model.model.q.oft_R.weight": torch.ones(2, 5)}), {"peft_type": "OFT"},
        "no skew matrix has 5 numbers above its diagonal",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_name_the_reason(name: str, lora: Path) -> None:
    tensors, config, message = REFUSALS[name]
    with pytest.raises(CheckpointError, match=message):
        read_adapter(edit(lora, tensors, **config))


def test_an_unknown_name_comes_with_the_nearest_one(lora: Path) -> None:
    edit(lora, lambda t: t.update({"base_model.model.layers.1.wide.lora_C.weight": torch.ones(2)}))
    with pytest.raises(CheckpointError) as caught:
        read_adapter(lora)
    assert caught.value.hint is not None and "layers.1.wide.lora_A.weight" in caught.value.hint


def test_adapter_names_inside_tensor_names(lora: Path) -> None:
    """A state dict taken from the live model has `.default` in its names."""
    before = read_adapter(lora)

    def rename(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if "lora_" in name]:
            tensors[name.replace(".weight", ".default.weight")] = tensors.pop(name)

    assert read_adapter(edit(lora, rename)).layers.keys() == before.layers.keys()


def test_resized_embeddings_and_legacy_saved_modules(lora: Path) -> None:
    def add(tensors: dict[str, Any]) -> None:
        tensors["base_model.model.embed_tokens.base_layer.weight"] = torch.ones(14, 12)
        tensors["base_model.model.lm_head.weight"] = torch.ones(14, 48)
        tensors["base_model.model.classifier.modules_to_save.extra"] = torch.ones(3)

    adapter = read_adapter(edit(lora, add))
    assert adapter.replacements["embed_tokens.weight"].shape == (14, 12)
    assert {"lm_head.weight", "classifier.extra"} <= adapter.replacements.keys()


def test_a_pickled_adapter(lora: Path) -> None:
    """What PEFT wrote before safetensors: adapter_model.bin."""
    from safetensors.torch import load_file

    path = lora / "adapter_model.safetensors"
    before, weight = read_adapter(lora), torch.ones(20, 12)
    expected = before.operator("layers.0.q").apply(weight)
    torch.save(load_file(path), lora / "adapter_model.bin")
    path.unlink()
    after = read_adapter(lora)
    assert after.layers.keys() == before.layers.keys()
    assert torch.equal(after.operator("layers.0.q").apply(weight), expected)


def test_llama_hra_turns_the_outputs(tmp_path: Path) -> None:
    """The HRA authors' patched OFT: `oft_r (out, r)`, soft reflections, W' = D^T W."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    vectors, weight = 0.01 * torch.randn(8, 4), torch.randn(8, 5)
    layer = "model.layers.0.self_attn.q_proj"
    save_file({f"base_model.model.{layer}.oft_r": vectors}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "OFT", "r": 4, "eps": 1e-3, "coft": False, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapter = read_adapter(tmp_path)
    assert (adapter.dialect, adapter.kind) == ("hra-llama", "hra")
    chain = torch.eye(8)
    for u in vectors.T:
        v = u / torch.sqrt(u.square().sum() + 1e-3)
        chain = chain @ (torch.eye(8) - 2 * torch.outer(v, v))
    torch.testing.assert_close(adapter.operator(layer).apply(weight), chain.T @ weight, rtol=1e-5, atol=1e-6)
    assert adapter.layers[layer].expects((8, 5)) is None
    assert "rows (outputs)" in str(adapter.layers[layer].expects((5, 8)))
    orthonormal = read_adapter(edit(tmp_path, apply_GS=True)).operator(layer)
    basis = torch.linalg.qr(vectors)[0]
    expected = weight - 2 * basis @ (basis.T @ weight)
    torch.testing.assert_close(orthonormal.apply(weight), expected, rtol=1e-4, atol=1e-5)


def test_the_neumann_series_of_peft_before_018(tmp_path: Path) -> None:
    """Its last power is doubled; the version in the configuration tells, and older ones did not write any."""
    folder = tmp_path / "adapter"
    adapter, _, base = trained(folder, make_config("oft neumann"))
    layer = "layers.0.q"
    with TensorReader() as reader:
        upper = reader.read_copy(adapter.layers[layer].tensors["skew"])
    skew = torch.zeros(6, 2, 2)
    skew[:, 0, 1], skew[:, 1, 0] = upper[:, 0], -upper[:, 0]
    blocks = sum(2 * torch.linalg.matrix_power(skew, k) for k in range(5)) - torch.eye(2)
    weight = base.state_dict()[f"{layer}.weight"]
    for version in ("0.17.1", None):
        old = read_adapter(edit(folder, peft_version=version))
        torch.testing.assert_close(old.operator(layer).apply(weight), weight @ torch.block_diag(*blocks).T)  # type: ignore[no-untyped-call]
        assert any("0.16 or 0.17" in note for note in old.notes)
