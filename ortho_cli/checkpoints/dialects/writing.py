"""What written adapters are called inside: tensor names, PEFT's configuration, kohya's and diffusers' metadata.

Names go in canonical (`unet.…`) or, for models that are no pipeline, as the model's own. The tensors themselves are
made by `surgery`; here is only what makes other tools understand them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ortho_cli.checkpoints.layouts import canonical_to_ldm, component_name, kohya_name

from .diffusers_lora import METADATA_KEY
from .peft import PREFIX

__all__ = [
    "diffusers_metadata",
    "hra_tensor_name",
    "kohya_metadata",
    "lora_tensor_names",
    "peft_config",
    "peft_name",
]


def peft_name(layer: str) -> str:
    """What PEFT calls a canonical or native layer: its name inside its component, which knows of no pipeline.

    >>> peft_name("unet.conv_in"), peft_name("model.layers.0.mlp")
    ('conv_in', 'model.layers.0.mlp')
    >>> peft_name("text_model.final_layer_norm")  # CLIP as a whole still has a `text_model`
    'text_model.final_layer_norm'
    """
    component, local = component_name(layer)
    return local if component else layer


def lora_tensor_names(dialect: str, layer: str) -> dict[str, str]:
    """The tensors of a LoRA layer: `down`, `up`, and for kohya `alpha`.

    Args:
        dialect: ``peft-lora``, ``kohya-lora`` or ``diffusers-lora``.
        layer: canonical or native layer name.

    Raises:
        TargetError: kohya's format has no name for the layer.

    >>> lora_tensor_names("kohya-lora", "unet.conv_in")["down"]
    'lora_unet_conv_in.lora_down.weight'
    >>> lora_tensor_names("peft-lora", "unet.conv_in")["up"]
    'base_model.model.conv_in.lora_B.weight'
    """
    if dialect == "kohya-lora":
        flat = kohya_name(layer)
        return {"down": f"{flat}.lora_down.weight", "up": f"{flat}.lora_up.weight", "alpha": f"{flat}.alpha"}
    if dialect not in ("peft-lora", "diffusers-lora"):
        raise ValueError(f"no LoRA dialect {dialect!r}; there are peft-lora, kohya-lora, diffusers-lora")
    name = PREFIX + peft_name(layer) if dialect == "peft-lora" else layer
    return {"down": f"{name}.lora_A.weight", "up": f"{name}.lora_B.weight"}


def hra_tensor_name(dialect: str, layer: str) -> str:
    """The tensor of a layer's reflections.

    Args:
        dialect: ``peft-hra``, or ``hra-repo``: beside ``fixed_linear`` in an LDM checkpoint, in the LDM's naming.
        layer: canonical or native layer name.

    >>> hra_tensor_name("peft-hra", "unet.mid_block.attentions.0.proj_in")
    'base_model.model.mid_block.attentions.0.proj_in.hra_u'
    >>> hra_tensor_name("hra-repo", "unet.mid_block.attentions.0.proj_in")
    'model.diffusion_model.middle_block.1.proj_in.hra_u'
    """
    if dialect == "peft-hra":
        return f"{PREFIX}{peft_name(layer)}.hra_u"
    if dialect != "hra-repo":
        raise ValueError(f"no HRA dialect {dialect!r}; there are peft-hra and hra-repo")
    return f"{canonical_to_ldm(layer) or layer}.hra_u"


def peft_config(
    kind: str,
    rank: int,
    target_modules: Sequence[str] | str,
    *,
    alpha: float | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    modules_to_save: Sequence[str] | None = None,
    bias: str = "none",
    apply_gs: bool = False,
    base_name: str | None = None,
    task_type: str | None = None,
) -> dict[str, Any]:
    """`adapter_config.json` of a PEFT folder, with the fields that every PEFT since 0.12 knows and no others.

    Args:
        kind: ``HRA`` or ``LORA``.
        rank: `r`; HRA has one for all layers.
        target_modules: names (matched by suffix, written sorted) or one regular expression.
        alpha: LoRA's `lora_alpha`, by default the rank: scale 1.
        rank_pattern: layers whose rank differs, LoRA only.
        alpha_pattern: layers whose alpha differs, LoRA only.
        modules_to_save: modules saved whole.
        bias: ``none``, ``all``, or ``hra_only`` / ``lora_only``.
        apply_gs: HRA's Gram-Schmidt form.
        base_name: what the base is called, for PEFT's `AutoPeftModel`.
        task_type: PEFT's task, e.g. ``SEQ_CLS``.

    >>> peft_config("HRA", 8, ["to_q"])["r"]
    8
    """
    if kind not in ("HRA", "LORA"):
        raise ValueError(f"kind is HRA or LORA, found {kind!r}")
    targets = target_modules if isinstance(target_modules, str) else sorted(target_modules)
    config: dict[str, Any] = {
        "auto_mapping": None,
        "base_model_name_or_path": base_name,
        "bias": bias,
        "inference_mode": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": None if modules_to_save is None else sorted(modules_to_save),
        "peft_type": kind,
        "r": rank,
        "revision": None,
        "target_modules": targets,
        "task_type": task_type,
    }
    if kind == "HRA":
        config |= {"apply_GS": apply_gs, "init_weights": True}
    else:
        config |= {
            "alpha_pattern": dict(alpha_pattern or {}),
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "lora_alpha": rank if alpha is None else alpha,
            "lora_dropout": 0.0,
            "rank_pattern": dict(rank_pattern or {}),
            "use_dora": False,
            "use_rslora": False,
        }
    return dict(sorted(config.items()))


def kohya_metadata(rank: int | None, alpha: float | None, module: str = "networks.lora") -> dict[str, str]:
    """The metadata by which kohya's tools and the web interfaces know a LoRA for SD1.x.

    Args:
        rank: that of all layers; None where it differs, which kohya writes as ``Dynamic``.
        alpha: likewise.
        module: what could load the file in sd-scripts.
    """
    return {
        "ss_base_model_version": "sd_v1",
        "ss_network_alpha": "Dynamic" if alpha is None else f"{alpha:g}",
        "ss_network_dim": "Dynamic" if rank is None else str(rank),
        "ss_network_module": module,
    }


def diffusers_metadata(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The metadata that keeps alpha in a diffusers LoRA file: each component's PEFT configuration, keys prefixed.

    Args:
        configs: component (``unet``, ``text_encoder``) -> its `peft_config`.
    """
    flat = {f"{component}.{key}": value for component, config in configs.items() for key, value in config.items()}
    return {METADATA_KEY: json.dumps(flat, indent=2, sort_keys=True)}
