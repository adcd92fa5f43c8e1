"""What convert refuses for want of an exact form, each with its reason and what to do instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_folders import Tensors, peft_folder
from safetensors.torch import save_file

from ortho_cli.errors import CheckpointError, OrthoError, TargetError, UsageError
from ortho_cli.surgery.convert import convert


def kohya(roles: Tensors, layer: str = "lora_unet_conv_in") -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        save_file({f"{layer}.{role}": tensor for role, tensor in roles.items()}, folder / "theirs.safetensors")
        return folder / "theirs.safetensors"

    return write


def peft(tensors: Tensors, **config: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        return peft_folder(folder / "theirs", tensors, **{"target_modules": ["to_q"], **config})

    return write


Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
AB = {f"{Q}.lora_A.weight": torch.ones(2, 12), f"{Q}.lora_B.weight": torch.ones(12, 2)}
OFT = peft({f"{Q}.oft_R.weight": torch.ones(3, 6)}, peft_type="OFT", r=0, oft_block_size=4)
LORA = peft(AB, peft_type="LORA", r=2, lora_alpha=2)
HRA = peft({f"{Q}.hra_u": torch.randn(12, 2)}, peft_type="HRA", r=2)
LLAMA = peft({f"{Q}.oft_r": torch.randn(12, 2)}, peft_type="OFT", r=2)
DORA = peft({**AB, f"{Q}.lora_magnitude_vector": torch.ones(12)}, peft_type="LORA", r=2, lora_alpha=2, use_dora=True)
BIASED = peft({**AB, f"{Q}.base_layer.bias": torch.ones(12)}, peft_type="LORA", r=2, lora_alpha=2, bias="lora_only")
LEFT, RIGHT = torch.ones(4, 2), torch.ones(2, 36)
LOHA = kohya({"hada_w1_a": LEFT, "hada_w1_b": RIGHT, "hada_w2_a": LEFT.clone(), "hada_w2_b": RIGHT.clone()})
MLP = {"h.0.mlp.lora_A.weight": torch.ones(2, 6), "h.0.mlp.lora_B.weight": torch.ones(6, 2)}
FOREIGN = peft(MLP, peft_type="LORA", r=2, lora_alpha=2)
TRANSPOSED = peft(AB, peft_type="LORA", r=2, lora_alpha=2, fan_in_fan_out=True)


@pytest.mark.parametrize(
    ("write", "form", "error", "message"),
    [
        (LORA, "peft-hra", TargetError, "is lora: not a product of reflections"),
        (OFT, "peft-hra", TargetError, "is oft: not a product of reflections"),
        (OFT, "peft-lora", TargetError, "is oft: a rotation of full rank has no exact LoRA form"),
        (DORA, "kohya-lora", TargetError, "is DoRA: its magnitudes depend on the base"),
        (TRANSPOSED, "kohya-lora", TargetError, "transposed weight"),
        (LLAMA, "peft-hra", TargetError, "reflects the output side"),
        (LLAMA, "hra-repo", UsageError, "writes a whole checkpoint"),
        (HRA, "peft-lora", UsageError, "only together with its base"),
        (HRA, "hra-repo", UsageError, "writes a whole checkpoint"),
        (LOHA, "peft-lora", UsageError, "does not say whether it sits on a Linear or a convolution"),
        (BIASED, "kohya-lora", CheckpointError, r"1 whole tensors of .*to_q\.bias.* no place in kohya-lora"),
        (FOREIGN, "kohya-lora", TargetError, r"'h\.0\.mlp' has no name in kohya's format"),
        (FOREIGN, "diffusers-lora", TargetError, r"h\.0\.mlp is in no component for which diffusers loads a LoRA"),
        (HRA, "lycoris", UsageError, "--to 'lycoris' is none of peft-hra, "),
        (HRA, "ldm", TargetError, "theirs is an adapter, without the weights it acts on"),
        (LORA, "diffusers", TargetError, "theirs is an adapter"),
        (HRA, "base", TargetError, "theirs is an adapter"),
    ],
)  # fmt: skip
def test_what_has_no_exact_form(
    tmp_path: Path, write: Callable[[Path], Path], form: str, error: type[OrthoError], message: str
) -> None:
    source = write(tmp_path)
    output = "out" if form.startswith("peft") else "out.safetensors"
    with pytest.raises(error, match=message) as caught:
        convert(source, tmp_path / output, form)
    assert caught.type is error
    assert caught.value.hint
    assert not (tmp_path / output).exists()
