"""Which naming a checkpoint uses, judged by its keys and shapes alone.

Evidence is looked for in the names that every variant has (cross-attention, CLIP layers), so that missing averages,
schedule buffers or text encoders and added HRA tensors do not matter. SD2 and SDXL share most names with SD1.x; what
tells them apart is the linear `proj_in`, the width of the text, deeper transformers and further embeddings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from .sd15 import COMPONENTS, ldm_to_canonical

__all__ = ["detect"]

Shape = tuple[int, ...]

_CROSS_ATTENTION = re.compile(
    r"unet\.(?:(?:down|up)_blocks\.\d+|mid_block)\.attentions\.\d+\.transformer_blocks\.0\.attn2\.to_k\.weight"
)
# Widths of the text in families with the names of SD1.x: SD2 (OpenCLIP-H), LDM-text2im and SDXL's refiner, SDXL.
_FOREIGN_TEXT = (1024, 1280, 2048)
# Modules of the UNet that SD1.x does not have (SDXL, SD2-unclip, Kandinsky).
_FOREIGN_UNET = ("label_emb.", "add_embedding.", "class_embedding.", "encoder_hid_proj.")
# Other text encoders beside an SD-like UNet.
_FOREIGN_TEXT_ENCODERS = ("cond_stage_model.model.", "conditioner.", "text_encoder_2.", "text_encoder_3.")
_CLIP = re.compile(
    r"(?:text_model\.)?(?:embeddings\.(?:(?:token|position)_embedding\.weight|position_ids)|final_layer_norm\.\w+|"
    r"encoder\.layers\.\d+\.(?:self_attn\.(?:[qkv]|out)_proj|mlp\.fc[12]|layer_norm[12])\.(?:weight|bias|hra_u))"
)
_VAE = (
    "encoder.conv_in.weight",
    "encoder.down_blocks.0.resnets.0.conv1.weight",
    "decoder.up_blocks.0.resnets.0.conv1.weight",
    "quant_conv.weight",  # the 16-channel autoencoders of SD3 and Flux have none
    "post_quant_conv.weight",
)


def detect(tensors: Mapping[str, Shape]) -> str:
    """Name the layout of a checkpoint from its tensor names and shapes.

    Args:
        tensors: tensor name -> shape; for a pipeline folder the names carry the component (`unet.conv_in.weight`).

    Returns:
        `sd15-ldm`, `sd15-diffusers`, `sd15-unet`, `sd15-vae`, `sd15-text-encoder`, or `plain` for anything else. The
        diffusers layouts are given for the grammar, whatever the number of blocks and channels; `sd15-ldm` only
        where all its cross-attention layers are in the tables. The autoencoder of SDXL has the names of SD1.5's and is
        told `sd15-vae`.

    Cost: a few passes over the names.

    >>> detect({"model.layers.0.self_attn.q_proj.weight": (8, 8)})
    'plain'
    """
    # An HRA checkpoint differs from its base by an inner `fixed_linear`.
    tensors = {name.replace(".fixed_linear.", "."): shape for name, shape in tensors.items()}
    if _is_unet(tensors, COMPONENTS["unet."], ldm=True):
        return "sd15-ldm"
    if _is_unet(tensors, "unet."):
        return "sd15-diffusers"
    if _is_unet(tensors, ""):
        return "sd15-unet"
    if all(name in tensors for name in _VAE):
        return "sd15-vae"
    if _is_clip(tensors):
        return "sd15-text-encoder"
    return "plain"


def _is_unet(tensors: Mapping[str, Shape], prefix: str, ldm: bool = False) -> bool:
    """Whether the names behind `prefix` are an SD1.x UNet's."""
    if any(name.startswith(_FOREIGN_TEXT_ENCODERS) for name in tensors):
        return False
    unet = {name[len(prefix) :]: shape for name, shape in tensors.items() if name.startswith(prefix)}
    if any(name.startswith(_FOREIGN_UNET) or ".transformer_blocks.1." in name for name in unet):
        return False
    keys = [name for name in unet if name.endswith(".attn2.to_k.weight")]
    for name in keys:
        canonical = ldm_to_canonical(prefix + name) if ldm else "unet." + name
        if canonical is None or not _CROSS_ATTENTION.fullmatch(canonical):
            return False
        if unet[name][-1:] and unet[name][-1] in _FOREIGN_TEXT:
            return False
        if len(unet.get(name.partition(".transformer_blocks.")[0] + ".proj_in.weight", (0, 0, 1, 1))) != 4:
            return False
    return bool(keys)


def _is_clip(tensors: Mapping[str, Shape]) -> bool:
    """Whether this is CLIP's text encoder of SD1.x and nothing else, with or without `text_model.`."""
    for prefix in ("text_model.", ""):
        shape = tensors.get(prefix + "embeddings.token_embedding.weight")
        if shape is not None and prefix + "encoder.layers.0.self_attn.q_proj.weight" in tensors:
            return shape[-1] not in _FOREIGN_TEXT and all(_CLIP.fullmatch(name) for name in tensors)
    return False
