"""Names and shapes of the real SD1.5 files, as tests/data holds them, and the variants in circulation."""

from __future__ import annotations

import json
from pathlib import Path

DATA = Path(__file__).parent.parent / "data"
Shapes = dict[str, tuple[int, ...]]


def load(name: str, prefix: str = "") -> Shapes:
    return {prefix + key: tuple(shape) for key, shape in json.loads((DATA / name).read_text()).items()}


LDM_TABLE = json.loads((DATA / "sd15_ldm_keys.json").read_text())
LDM: Shapes = {name: tuple(shape) for name, (_, shape) in LDM_TABLE.items()}
UNET = load("sd15_unet_diffusers_shapes.json")
VAE = load("sd15_vae_diffusers_shapes.json")
CLIP_FLAT = load("sd15_clip_hf_shapes.json")
CLIP = {"text_model." + name: shape for name, shape in CLIP_FLAT.items()}
PIPELINE: Shapes = {
    **{"unet." + name: shape for name, shape in UNET.items()},
    **{"vae." + name: shape for name, shape in VAE.items()},
    **{"text_encoder." + name: shape for name, shape in CLIP.items()},
}
OLD_VAE = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def old_vae(name: str) -> str:
    for new, old in OLD_VAE.items():
        name = name.replace(f"mid_block.attentions.0.{new}.", f"mid_block.attentions.0.{old}.")
    return name


def as_hra(tensors: Shapes) -> Shapes:
    """As the HRA authors' tool leaves a file: `fixed_linear` in the adapted layers, their vectors, a control model."""
    targets = set(hra_targets())
    out: Shapes = {"logvar": (1000,), "control_model.time_embed.0.weight": (1280, 320)}
    for name, shape in tensors.items():
        layer, _, kind = name.rpartition(".")
        out[f"{layer}.fixed_linear.{kind}" if layer in targets else name] = shape
        if layer in targets and kind == "weight":
            out[f"{layer}.hra_u"] = (shape[1], 8)
    return out


def hra_targets() -> list[str]:
    """The layers the HRA authors' tool adapts, in its order."""
    lines = (DATA / "sd15_hra_targets.txt").read_text().splitlines()
    return [line.split("\t")[0].removesuffix(".hra_u") for line in lines]


def layers_of(tensors: Shapes) -> Shapes:
    """Layer -> weight shape, for weights of two or more dimensions."""
    found = {name.removesuffix(".weight"): shape for name, shape in tensors.items() if name.endswith(".weight")}
    return {layer: shape for layer, shape in found.items() if len(shape) >= 2}
