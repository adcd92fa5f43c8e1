"""Names and configurations that are written: they read back, and PEFT takes them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ortho_cli.checkpoints.adapters import base_bound, read_adapter
from ortho_cli.checkpoints.dialects.writing import (
    diffusers_metadata,
    hra_tensor_name,
    kohya_metadata,
    lora_tensor_names,
    peft_config,
)
from ortho_cli.errors import TargetError

DATA = Path(__file__).parents[1] / "data"


def adapted_layers() -> dict[str, tuple[int, ...]]:
    """The layers kohya trains on SD1.5 by default, canonical name -> weight shape: 192 of the UNet, 72 of CLIP."""
    unet = json.loads((DATA / "sd15_unet_diffusers_shapes.json").read_text())
    clip = json.loads((DATA / "sd15_clip_hf_shapes.json").read_text())
    names = {f"unet.{name}": shape for name, shape in unet.items() if ".attentions." in name}
    names |= {f"text_encoder.text_model.{name}": shape for name, shape in clip.items() if name.startswith("encoder.")}
    return {name.removesuffix(".weight"): tuple(shape) for name, shape in names.items() if len(shape) > 1}


LAYERS = adapted_layers()


def test_there_are_192_and_72_layers() -> None:
    assert [sum(name.startswith(prefix) for name in LAYERS) for prefix in ("unet.", "text_encoder.")] == [192, 72]


def factors(dialect: str, layers: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Rank-1 factors of the right shapes for every layer, under the dialect's names."""
    tensors = {}
    for layer, (out, inputs, *kernel) in layers.items():
        names = lora_tensor_names(dialect, layer)
        tensors[names["down"]] = torch.ones(1, inputs, *kernel, dtype=torch.float16)
        tensors[names["up"]] = torch.ones(out, 1, *(1 for _ in kernel), dtype=torch.float16)
        if "alpha" in names:
            tensors[names["alpha"]] = torch.tensor(1.0)
    return tensors


@pytest.mark.parametrize("dialect", ["kohya-lora", "diffusers-lora"])
def test_every_layer_comes_back_from_one_file(dialect: str, tmp_path: Path) -> None:
    configs = {name: peft_config("LORA", 1, ["to_q"]) for name in ("unet", "text_encoder")}
    metadata = kohya_metadata(1, 1.0) if dialect == "kohya-lora" else diffusers_metadata(configs)
    save_file(factors(dialect, LAYERS), tmp_path / "x.safetensors", metadata)
    adapter = read_adapter(tmp_path / "x.safetensors")
    assert adapter.dialect == dialect.removesuffix("-lora")
    assert adapter.layers.keys() == LAYERS.keys()
    assert all(adapter.layers[layer].expects(shape) is None for layer, shape in LAYERS.items())


def test_every_layer_comes_back_from_peft_folders(tmp_path: Path) -> None:
    for component in ("unet", "text_encoder"):
        own = {layer: shape for layer, shape in LAYERS.items() if layer.startswith(component)}
        folder = tmp_path / component
        folder.mkdir()
        save_file(factors("peft-lora", own), folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(peft_config("LORA", 1, ["to_q"])))
    assert read_adapter(tmp_path).layers.keys() == LAYERS.keys()


def test_hra_names_of_the_papers_checkpoint() -> None:
    """The 144 targets as the authors' tool names them."""
    wanted = {line.split()[0] for line in (DATA / "sd15_hra_targets.txt").read_text().splitlines() if ".hra_u" in line}
    assert len(wanted) == 144
    assert wanted <= {hra_tensor_name("hra-repo", layer) for layer in LAYERS}
    assert hra_tensor_name("hra-repo", "encoder.layer.0.query") == "encoder.layer.0.query.hra_u"


def test_names_outside_a_format() -> None:
    with pytest.raises(TargetError, match="no name in kohya's format"):
        lora_tensor_names("kohya-lora", "model.layers.0.mlp")
    with pytest.raises(ValueError, match="no LoRA dialect"):
        lora_tensor_names("peft", "unet.conv_in")
    with pytest.raises(ValueError, match="no HRA dialect"):
        hra_tensor_name("hra", "unet.conv_in")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.transformer = nn.ModuleList([nn.Linear(6, 6, bias=False) for _ in range(2)])


@pytest.mark.parametrize("kind", ["HRA", "LORA"])
def test_peft_loads_what_the_names_and_the_configuration_say(kind: str, tmp_path: Path) -> None:
    import peft

    torch.manual_seed(1)
    layers = ["transformer.0", "transformer.1"]
    config = peft_config(kind, 2, layers, alpha=None if kind == "HRA" else 3, base_name="a base")
    tensors = {}
    for layer in layers:
        if kind == "HRA":
            tensors[hra_tensor_name("peft-hra", layer)] = torch.randn(6, 2)
        else:
            names = lora_tensor_names("peft-lora", layer)
            tensors |= {names["down"]: torch.randn(2, 6), names["up"]: torch.randn(6, 2)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # unknown keys, missing keys
        merged = peft.PeftModel.from_pretrained(Model(), str(tmp_path)).merge_and_unload()
    adapter = read_adapter(tmp_path)
    for layer in layers:
        ours = adapter.operator(layer).apply(Model().get_parameter(f"{layer}.weight").detach())
        torch.testing.assert_close(ours, merged.get_parameter(f"{layer}.weight").detach(), rtol=1e-5, atol=1e-6)


def test_configurations_hold_only_what_peft_012_knows() -> None:
    """Its constructors raise on any other field."""
    common = {
        "auto_mapping", "base_model_name_or_path", "bias", "inference_mode", "layers_pattern", "layers_to_transform",
        "modules_to_save", "peft_type", "r", "revision", "target_modules", "task_type",
    }  # fmt: skip
    hra = peft_config("HRA", 8, ["b", "a"], bias="hra_only", modules_to_save=["z", "y"])
    assert hra.keys() == common | {"apply_GS", "init_weights"}
    assert list(hra) == sorted(hra) and hra["target_modules"] == ["a", "b"] and hra["modules_to_save"] == ["y", "z"]
    lora = peft_config("LORA", 8, ".*q", rank_pattern={"q": 4}, alpha_pattern={"q": 2.0})
    assert lora.keys() == common | {
        "alpha_pattern", "fan_in_fan_out", "init_lora_weights", "lora_alpha", "lora_dropout", "rank_pattern",
        "use_dora", "use_rslora",
    }  # fmt: skip
    assert lora["lora_alpha"] == 8 and lora["target_modules"] == ".*q"
    with pytest.raises(ValueError, match="kind is HRA or LORA"):
        peft_config("OFT", 8, [])


def test_kohya_metadata() -> None:
    assert kohya_metadata(8, 4.0) == {
        "ss_base_model_version": "sd_v1",
        "ss_network_alpha": "4",
        "ss_network_dim": "8",
        "ss_network_module": "networks.lora",
    }
    assert kohya_metadata(None, None)["ss_network_dim"] == "Dynamic"


def test_what_was_exported_from_hra_is_bound_to_its_base(tmp_path: Path) -> None:
    tensors = factors("kohya-lora", {"unet.conv_in": (4, 4, 3, 3)})
    for metadata, bound in (
        ({"ortho.method": '{"name": "hra", "rank": 1}'}, True),
        ({"ortho.method": '{"name": "lora", "base_bound": true}'}, True),
        ({"ortho.method": '{"name": "lora"}'}, False),
        ({}, False),
    ):
        save_file(tensors, tmp_path / "x.safetensors", metadata)
        assert base_bound(read_adapter(tmp_path / "x.safetensors")) is bound
