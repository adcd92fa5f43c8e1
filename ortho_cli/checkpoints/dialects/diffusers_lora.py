"""LoRA files of diffusers: PEFT's tensors in one file, under the pipeline's component names.

    unet.<layer>.lora_A.weight                 today; the PEFT configuration may be in the metadata
    unet.<layer>.lora.down.weight              diffusers 0.17 to 0.26
    unet.<attention>.processor.to_q_lora.down.weight                      before
    text_encoder.<layer>.lora_linear_layer.down.weight                    before

Older names are brought into today's form and then read as PEFT's. Without metadata alpha is the rank: scale 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from ortho_cli.checkpoints.layouts import to_canonical
from ortho_cli.checkpoints.tensors import TensorInfo
from ortho_cli.errors import CheckpointError

from .contents import Contents, Dialect
from .peft import PREFIX, read_peft

__all__ = ["DIALECT", "METADATA_KEY", "modern_name", "read_diffusers"]

METADATA_KEY = "lora_adapter_metadata"
COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "prior")
_FACTOR = {"down": "lora_A", "up": "lora_B"}
# Attention modules by their processor's parameter, in the UNet and in CLIP.
_UNET_MODULES = {"to_out": "to_out.0"}
_CLIP_MODULES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def modern_name(name: str) -> str:
    """A tensor name of any age as today's diffusers writes it; other names stay themselves.

    >>> modern_name("unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight")
    'unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_B.weight'
    """
    plain = re.fullmatch(r"(.+)\.(?:lora|lora_linear_layer)\.(down|up)\.weight", name)
    if plain is not None:
        return f"{plain[1]}.{_FACTOR[plain[2]]}.weight"
    processor = re.fullmatch(r"(.+?)(?:\.processor)?\.(\w+)_lora\.(down|up)\.weight", name)
    if processor is None:
        return name
    modules = _CLIP_MODULES if processor[1].endswith(".self_attn") else _UNET_MODULES
    return f"{processor[1]}.{modules.get(processor[2], processor[2])}.{_FACTOR[processor[3]]}.weight"


def read_diffusers(
    tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], where: str
) -> tuple[Contents, dict[str, Any]]:
    """Read a diffusers LoRA file, or what `save_lora_adapter` wrote of another PEFT type.

    Returns:
        The contents, layer names with their component where the file has it, and the configuration in the metadata.

    Raises:
        CheckpointError: as `read_peft`; metadata that is no JSON object; two names for one factor.
    """
    config = _config(metadata, where)
    parts: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        component, _, rest = name.partition(".")
        if component not in COMPONENTS:
            component, rest = "", name
        key = modern_name(rest)
        if parts.setdefault(component, {}).setdefault(key, info) is not info:
            raise CheckpointError(f"{name!r} and {parts[component][key].name!r} are the same factor", where=where)
    contents = Contents()
    for component, part in parts.items():
        own = config if not component else _below(config, component)
        _, found = read_peft(part, own or {"peft_type": "LORA", "r": None, "lora_alpha": None}, where)
        contents.take(found, component)
    if not config:
        contents.notes.append("no configuration in the file: alpha is taken to be the rank, as diffusers does")
    contents.rename(lambda name: to_canonical(name, "sd15-diffusers"))
    return contents, config


def _below(config: Mapping[str, Any], component: str) -> dict[str, Any]:
    """The configuration of one component: keys `component.key`, of an unprefixed one all keys."""
    prefix = f"{component}."
    found = {key[len(prefix) :]: value for key, value in config.items() if key.startswith(prefix)}
    return {"peft_type": "LORA", **found} if found else {}


def _config(metadata: Mapping[str, str], where: str) -> dict[str, Any]:
    text = metadata.get(METADATA_KEY)
    if text is None:
        return {}
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"metadata field {METADATA_KEY} is not JSON", where=where) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"metadata field {METADATA_KEY} is not a JSON object", where=where)
    return content


_LORA = re.compile(r"(\.lora_[AB](\.default)?\.(weight|bias)|\.lora\.(down|up)\.weight|_lora\.(down|up)\.weight|"
                   r"\.lora_linear_layer\.(down|up)\.weight|\.lora_magnitude_vector)$")  # fmt: skip


def _claims(names: Collection[str], config: Mapping[str, Any], metadata: Mapping[str, str]) -> bool:
    """LoRA's names without PEFT's prefix; or any tuner's, saved by diffusers with the configuration in the metadata."""
    if METADATA_KEY in metadata and any(name.endswith(".hra_u") for name in names):
        return True
    return any(_LORA.search(name) for name in names) and not any(name.startswith(PREFIX) for name in names)


def _read(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], metadata: Mapping[str, str], where: str
) -> tuple[str, Contents, dict[str, Any]]:
    contents, found = read_diffusers(tensors, metadata, where)
    return "diffusers", contents, found


DIALECT = Dialect(_claims, _read)
