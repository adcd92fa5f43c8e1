"""Files that diffusers writes, today's by diffusers itself, older ones by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ortho_cli.checkpoints.adapters import read_adapter
from ortho_cli.checkpoints.dialects.diffusers_lora import modern_name
from ortho_cli.errors import CheckpointError

ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1"


def tiny_unet() -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 8),
        layers_per_block=1,
        sample_size=8,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=2,
    )


def adapted(config: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """A UNet with an adapter whose every number moved, and its base weights."""
    unet = tiny_unet()
    base = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    unet.add_adapter(config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return unet, base


def merged(unet: nn.Module, layer: str) -> torch.Tensor:
    """PEFT's own merge of one layer."""
    module: Any = unet.get_submodule(layer)
    module.merge()
    weight: torch.Tensor = module.get_base_layer().weight
    return weight.detach()


TARGETS = ["to_q", "to_out.0", "conv1"]


@pytest.mark.parametrize("kind", ["HRA", "Lora"])
def test_save_lora_adapter(kind: str, tmp_path: Path) -> None:
    """It saves any PEFT type, its configuration in the metadata, names without component."""
    import peft

    options = {"r": 4, "target_modules": TARGETS} | ({} if kind == "HRA" else {"lora_alpha": 6})
    unet, base = adapted(getattr(peft, f"{kind}Config")(**options))
    unet.save_lora_adapter(tmp_path)
    adapter = read_adapter(tmp_path)
    assert (adapter.dialect, adapter.kind) == ("diffusers", kind.lower())
    assert adapter.config["peft_type"] == kind.upper()
    for layer in (f"{ATTENTION}.to_q", f"{ATTENTION}.to_out.0", "mid_block.resnets.0.conv1"):
        weight = base[f"{layer}.weight"]
        ours = adapter.operator(layer).apply(weight.flatten(1)).view_as(weight)
        torch.testing.assert_close(ours, merged(unet, layer), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_metadata", [True, False])
def test_save_lora_weights(with_metadata: bool, tmp_path: Path) -> None:
    """A pipeline's file: component in front; alpha only in the metadata, else taken as the rank."""
    import peft
    from diffusers import StableDiffusionPipeline
    from peft.utils import get_peft_model_state_dict

    unet, base = adapted(peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS))
    metadata = {key: list(v) if isinstance(v, set) else v for key, v in unet.peft_config["default"].to_dict().items()}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=metadata if with_metadata else None,
    )
    adapter = read_adapter(tmp_path / "pytorch_lora_weights.safetensors")
    layer = f"{ATTENTION}.to_q"
    weight = base[f"{layer}.weight"]
    ours = adapter.operator(f"unet.{layer}").apply(weight) - weight
    delta = merged(unet, layer) - weight
    torch.testing.assert_close(ours, delta if with_metadata else delta * 4 / 6, rtol=1e-4, atol=1e-6)
    assert any("alpha is taken to be the rank" in note for note in adapter.notes) is not with_metadata


CLIP = "text_encoder.text_model.encoder.layers.0"
OLDER = {
    f"unet.{ATTENTION}.processor.to_q_lora.down.weight": f"unet.{ATTENTION}.to_q.lora_A.weight",
    f"unet.{ATTENTION}.processor.to_out_lora.up.weight": f"unet.{ATTENTION}.to_out.0.lora_B.weight",
    f"unet.{ATTENTION}.processor.add_k_proj_lora.up.weight": f"unet.{ATTENTION}.add_k_proj.lora_B.weight",
    f"{ATTENTION}.processor.to_v_lora.down.weight": f"{ATTENTION}.to_v.lora_A.weight",
    f"unet.{ATTENTION}.to_q.lora.up.weight": f"unet.{ATTENTION}.to_q.lora_B.weight",
    f"{CLIP}.self_attn.to_q_lora.down.weight": f"{CLIP}.self_attn.q_proj.lora_A.weight",
    f"{CLIP}.self_attn.to_out_lora.up.weight": f"{CLIP}.self_attn.out_proj.lora_B.weight",
    f"{CLIP}.mlp.fc1.lora_linear_layer.down.weight": f"{CLIP}.mlp.fc1.lora_A.weight",
    f"unet.{ATTENTION}.to_q.lora_A.weight": f"unet.{ATTENTION}.to_q.lora_A.weight",
}


@pytest.mark.parametrize("name", OLDER)
def test_names_of_every_age(name: str) -> None:
    assert modern_name(name) == OLDER[name]


def test_an_older_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    down, up, weight = torch.randn(2, 6), torch.randn(4, 2), torch.randn(4, 6)
    names = [
        f"unet.{ATTENTION}.processor.to_out_lora",
        f"{CLIP}.self_attn.to_v_lora",
        f"{CLIP}.mlp.fc2.lora_linear_layer",
    ]
    tensors = {f"{name}.{end}.weight": factor.clone() for name in names for end, factor in (("down", down), ("up", up))}
    save_file(tensors, tmp_path / "x.safetensors")
    adapter = read_adapter(tmp_path / "x.safetensors")
    assert set(adapter.layers) == {f"unet.{ATTENTION}.to_out.0", f"{CLIP}.self_attn.v_proj", f"{CLIP}.mlp.fc2"}
    for layer in adapter.layers:
        torch.testing.assert_close(adapter.operator(layer).apply(weight), weight + up @ down)


def test_alphas_dora_and_flat_text_encoders(tmp_path: Path) -> None:
    """Some files bring alpha as a tensor; transformers since 5.6 leaves `text_model` out of CLIP's names."""
    tensors = {
        "text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight": torch.ones(2, 6),
        "text_encoder.encoder.layers.0.mlp.fc1.lora_B.weight": torch.ones(4, 2),
        "text_encoder.encoder.layers.0.mlp.fc1.alpha": torch.tensor(1.0),
        "unet.conv_in.lora_A.weight": torch.ones(2, 6),
        "unet.conv_in.lora_B.weight": torch.ones(4, 2),
        "unet.conv_in.lora_magnitude_vector": torch.full((4,), 3.0),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    adapter = read_adapter(tmp_path / "x.safetensors")
    moved = adapter.operator("text_encoder.text_model.encoder.layers.0.mlp.fc1").apply(torch.zeros(4, 6))
    torch.testing.assert_close(moved, torch.ones(4, 6))
    lengths = adapter.operator("unet.conv_in").apply(torch.zeros(4, 6)).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full((4,), 3.0))


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        (["unet.x.lora_A.weight"], {}, "lacks its tensor 'up'"),
        (["unet.x.lora_A.weight", "unet.x.lora_B.weight", "unet.y.weight"], {}, "unknown tensor 'unet.y.weight'"),
        (["unet.x.lora_A.weight", "unet.x.lora.down.weight"], {}, "are the same factor"),
        (["unet.x.lora_A.weight"], {"lora_adapter_metadata": "{"}, "lora_adapter_metadata is not JSON"),
        (["unet.x.lora_A.weight"], {"lora_adapter_metadata": "[]"}, "is not a JSON object"),
        (["x.lora_A.weight"], {"lora_adapter_metadata": json.dumps({"peft_type": "VERA"})}, "type VERA are not read"),
    ],
)
def test_refusals_name_the_reason(tensors: list[str], metadata: dict[str, str], message: str, tmp_path: Path) -> None:
    save_file({name: torch.ones(2, 2) for name in tensors}, tmp_path / "x.safetensors", metadata)
    with pytest.raises(CheckpointError, match=message):
        read_adapter(tmp_path / "x.safetensors")
