"""Which layers adapters usually go on, by the kind of model: what `targets: auto` means."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from ortho_cli.checkpoints.presets import PRESETS, default_preset
from ortho_cli.errors import TargetError

__all__ = ["FAMILIES", "automatic_patterns"]

# Names by which a family is known, and the layers that are adapted in it: query and value, as the LoRA paper does and
# PEFT by default, or the one layer that holds both. The first family all of whose names are found is taken.
FAMILIES: dict[str, tuple[str, ...]] = {
    "BERT, RoBERTa": ("attention.self.query", "attention.self.value"),
    "ViT of transformers": ("attention.attention.query", "attention.attention.value"),
    "ViT of transformers 5": ("attention.q_proj", "attention.v_proj"),
    "ViT of timm and ortho": ("blocks.*.attn.qkv",),
    "GPT-2": ("attn.c_attn",),
    "T5": ("SelfAttention.q", "SelfAttention.v"),
    "GPT-NeoX, BLOOM, Falcon": ("query_key_value",),
    "DistilBERT": ("q_lin", "v_lin"),
    "diffusers": ("to_q", "to_k", "to_v", "to_out.0"),
    "attention with q_proj and v_proj": ("q_proj", "v_proj"),
}
SHOWN = 6


def automatic_patterns(layers: Mapping[str, tuple[int, ...]], layout: str) -> list[str]:
    """The patterns of a model whose user named none.

    Args:
        layers: layer name -> weight shape.
        layout: the naming.

    Raises:
        TargetError: no family is recognised; the hint lists what there is.

    >>> automatic_patterns({"blocks.0.attn.qkv": (12, 4), "blocks.0.attn.proj": (4, 4)}, "plain")
    ['blocks.*.attn.qkv']
    """
    preset = default_preset(layers, layout)
    if preset is not None:
        return [preset]
    for patterns in FAMILIES.values():
        if all(_found(pattern, layers) for pattern in patterns):
            return list(patterns)
    ends = Counter(".".join(part for part in name.split(".")[-2:] if not part.isdigit()) or name for name in layers)
    shown = ", ".join(f"{end} ({count})" for end, count in ends.most_common(SHOWN))
    raise TargetError(
        f"targets: auto knows no layers for a model of {len(layers)} layers in this naming",
        hint=f"name them: patterns over {shown}; or a preset: {', '.join(PRESETS)}",
    )


def _found(pattern: str, layers: Mapping[str, tuple[int, ...]]) -> bool:
    from ortho_cli.checkpoints.globs import compile_glob

    glob = compile_glob(pattern)
    return any(glob.fullmatch(name) for name in layers)
