"""One layer, many names: SD1.x layouts, kohya's flattened names, names inside a pipeline's component.

Everything is translated through the *canonical* name, which `sd15.py` defines.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ortho_cli.errors import TargetError

from .sd15 import canonical_to_ldm, ldm_to_canonical

__all__ = [
    "LAYOUTS",
    "component_name",
    "filed_name",
    "fingerprint_name",
    "from_canonical",
    "kohya_layers",
    "kohya_name",
    "modern_name",
    "to_canonical",
]

LAYOUTS = ("sd15-ldm", "sd15-diffusers", "sd15-unet", "sd15-vae", "sd15-text-encoder", "plain")

# A layout that holds one component without saying so in its names -> that component.
_COMPONENT = {"sd15-unet": "unet.", "sd15-vae": "vae.", "sd15-text-encoder": "text_encoder."}
# Names of diffusers before 0.15 in the autoencoder's attention, which published files still have.
_OLD_VAE = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_VAE_ATTENTION = tuple(f"vae.{side}.mid_block.attentions.0." for side in ("encoder", "decoder"))
# The modules that transformers >= 5.6 saves without `text_model.` in front.
_CLIP_MODULES = ("embeddings.", "encoder.", "final_layer_norm")
# transformers >= 5 calls layers of its vision transformers otherwise in memory than in files: in the blocks `layers.0`
# of ViT and its kin (never `encoder.layers.0`, which is CLIP's), or `encoder.layer.0` of DINOv2.
_VISION_BLOCK = re.compile(r"((?:.*\.)?)((?<!encoder\.)(?<!decoder\.)layers|encoder\.layer)\.(\d+)\.(.+)")
_VISION_LAYERS = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
# What a model is called inside a pipeline; an adapter on the bare model does not have it.
_PIPELINE = ("unet.", "text_encoder.", "text_encoder_2.", "vae.", "transformer.")
_KOHYA = {"unet.": "lora_unet_", "text_encoder.": "lora_te_"}


def to_canonical(name: str, layout: str) -> str:
    """The canonical name of a tensor or layer; a name the tables do not hold stays itself.

    >>> to_canonical("encoder.layers.0.mlp.fc1", "sd15-text-encoder")
    'text_encoder.text_model.encoder.layers.0.mlp.fc1'
    """
    _check(layout)
    if layout == "plain":
        return name
    if layout == "sd15-ldm":
        return ldm_to_canonical(name) or name
    return modern_name(_COMPONENT.get(layout, "") + name)


def from_canonical(name: str, layout: str) -> str | None:
    """The name in `layout` of a canonical tensor or layer; None where the layout has no place for it.

    Gives the spelling every reader understands: CLIP with `text_model.`, the autoencoder with `to_q`. What the tensors
    of a checkpoint at hand are called is :meth:`LayerIndex.resolve`'s answer.

    >>> from_canonical("unet.conv_in.bias", "sd15-unet"), from_canonical("vae.quant_conv.bias", "sd15-unet")
    ('conv_in.bias', None)
    """
    _check(layout)
    if layout == "sd15-ldm":
        return canonical_to_ldm(name)
    component = _COMPONENT.get(layout, "")
    return name[len(component) :] if name.startswith(component) else None


def _check(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"no layout {layout!r}; there are {', '.join(LAYOUTS)}")


def modern_name(name: str) -> str:
    """A diffusers name with component in today's spelling; any other name stays itself.

    >>> modern_name("vae.encoder.mid_block.attentions.0.proj_attn.bias")
    'vae.encoder.mid_block.attentions.0.to_out.0.bias'
    """
    for prefix in _VAE_ATTENTION:
        if name.startswith(prefix):
            part, dot, rest = name[len(prefix) :].partition(".")
            return prefix + _OLD_VAE.get(part, part) + dot + rest
    if name.startswith(tuple("text_encoder." + module for module in _CLIP_MODULES)):
        return "text_encoder.text_model." + name.removeprefix("text_encoder.")
    return name


def kohya_name(canonical_layer: str) -> str:
    """The name of a layer in kohya's files, which the image tools read.

    Raises:
        TargetError: the layer is in neither the UNet nor the text encoder.

    >>> kohya_name("unet.mid_block.attentions.0.proj_in")
    'lora_unet_mid_block_attentions_0_proj_in'
    """
    for component, prefix in _KOHYA.items():
        if canonical_layer.startswith(component):
            return prefix + canonical_layer[len(component) :].replace(".", "_")
    raise TargetError(
        f"layer {canonical_layer!r} has no name in kohya's format, which knows the UNet and the text encoder only",
        hint="write another format, e.g. --to peft-lora",
    )


def kohya_layers(canonical_layers: Iterable[str]) -> dict[str, str]:
    """The table that reads kohya's names: kohya name -> canonical layer, for every layer that has one.

    Flattening dots to underscores cannot be undone by rule (`to_out.0` and `to_out_0` look alike), only by looking up
    the layers there are.

    Raises:
        TargetError: two layers flatten to one name.
    """
    table: dict[str, str] = {}
    for layer in canonical_layers:
        if layer.startswith(tuple(_KOHYA)):
            other = table.setdefault(kohya_name(layer), layer)
            if other != layer:
                raise TargetError(f"layers {other!r} and {layer!r} are both {kohya_name(layer)!r} in kohya's format")
    return table


def component_name(canonical: str) -> tuple[str, str]:
    """The component of a pipeline that a layer or tensor is in ("" for none), and its name inside that component.

    The name inside is what a PEFT adapter on the bare component calls it: `text_model.` falls away too, since CLIP's
    text encoder no longer has it (transformers >= 5.6).

    >>> component_name("text_encoder.text_model.encoder.layers.0.mlp.fc1")
    ('text_encoder', 'encoder.layers.0.mlp.fc1')
    >>> component_name("transformer.h.0.attn.c_attn")
    ('', 'transformer.h.0.attn.c_attn')
    """
    prefix = next((prefix for prefix in _PIPELINE if canonical.startswith(prefix)), "")
    local = canonical[len(prefix) :].removeprefix("text_model.")
    # GPT-2, Falcon and others call the network itself `transformer`; diffusers has these blocks below it.
    if prefix == "transformer." and not local.startswith(("transformer_blocks.", "single_transformer_blocks.")):
        return "", canonical
    return prefix.removesuffix("."), local


def fingerprint_name(canonical_layer: str) -> str:
    """The name of a layer that is the same in every layout and without a pipeline around it.

    >>> fingerprint_name("unet.conv_in")
    'conv_in'
    """
    return filed_name(component_name(canonical_layer)[1])


def filed_name(layer: str) -> str:
    """The name in files of a layer that transformers calls otherwise in memory; any other name stays itself.

    >>> filed_name("vit.layers.0.attention.q_proj")
    'vit.encoder.layer.0.attention.attention.query'
    """
    found = _VISION_BLOCK.fullmatch(layer)
    if found is None:
        return layer
    front, block, number, own = found.groups()
    if own not in _VISION_LAYERS or (block == "encoder.layer" and own.startswith("mlp.")):
        return layer
    return f"{front}encoder.layer.{number}.{_VISION_LAYERS[own]}"
