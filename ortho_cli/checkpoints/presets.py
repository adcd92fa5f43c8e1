"""Named layer selections, and which one a checkpoint gets when nobody says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .layouts import to_canonical

__all__ = ["PRESETS", "Preset", "default_preset", "preset_scope"]


@dataclass(frozen=True, slots=True)
class Preset:
    """A named selection: its globs (each must match), what they leave out, and a line for the help."""

    description: str
    patterns: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    matrices_only: bool = False  # leaves convolutions out


_SD_ATTENTION = ("attn{1,2}.to_{q,k,v}", "attn{1,2}.to_out.0")
_ENCODER_LAYER = "encoder.layer.*."
_ENCODER_DENSE = ("attention.output.dense", "intermediate.dense", "output.dense")
# Two-dimensional weights that are looked up, not multiplied, by the last component of the layer's name.
_EMBEDDINGS = (
    "{embed,embeddings,embed_tokens,embed_positions,embed_in,tok_embeddings,wte,wpe,shared,relative_attention_bias}",
    "{word,position,token_type,rel}_embeddings",
    "{token,position}_embedding",
)
# Output heads with everything in them; a pooler is part of the body.
_HEADS = (
    "{lm_head,classifier,score,embed_out,output_projection,qa_outputs}{,.**}",
    "{lm_predictions,mask_predictions,cls.predictions,cls.seq_relationship}{,.**}",
)

PRESETS: dict[str, Preset] = {
    "sd15-control": Preset(
        "HRA's controllable generation: q, k, v, out and the GEGLU projection of Stable Diffusion's UNet (144 layers)",
        (*_SD_ATTENTION, "ff.net.0.proj"),
    ),
    "sd15-attention": Preset("q, k, v and out of Stable Diffusion's UNet (128 layers)", _SD_ATTENTION),
    "llama-qv": Preset(
        "q and v of LLaMA-like language models (64 layers of LLaMA-2-7B)", ("self_attn.q_proj", "self_attn.v_proj")
    ),
    "llama-all": Preset(
        "every Linear in the blocks of LLaMA, Mistral, Qwen and their like (224 layers of LLaMA-2-7B)",
        ("self_attn.{q,k,v,o}_proj", "mlp.{gate,up,down}_proj"),
    ),
    "gpt2-all": Preset(
        "every Conv1D in the blocks of GPT-2 (48 layers of the small one)",
        ("h.*.attn.c_attn", "h.*.attn.c_proj", "h.*.mlp.c_fc", "h.*.mlp.c_proj"),
    ),
    "t5-all": Preset(
        "every Linear in the blocks of T5, encoder and decoder (192 layers of T5-base)",
        ("block.*.layer.*.{Self,EncDec}Attention.{q,k,v,o}", "block.*.layer.*.DenseReluDense.w{i,o}{,_0,_1}"),
    ),
    "bert-all": Preset(
        "every Linear in the encoder of BERT and RoBERTa (72 layers of the base size)",
        (
            _ENCODER_LAYER + "attention.self.{query,key,value}",
            *(_ENCODER_LAYER + part for part in _ENCODER_DENSE),
        ),
    ),
    "deberta-all": Preset(
        "every Linear of a DeBERTa encoder (72 layers of DeBERTaV3-base)",
        (
            _ENCODER_LAYER + "attention.self.{query,key,value}_proj",
            *(_ENCODER_LAYER + part for part in _ENCODER_DENSE),
        ),
    ),
    "all-linear": Preset(
        "every Linear but embeddings and the output head; of Stable Diffusion the UNet's (184 layers)",
        ("**",),
        exclude=(*_EMBEDDINGS, *_HEADS),
        matrices_only=True,
    ),
}

_UNET = ("unet.", "model.diffusion_model.")


def preset_scope(layers: Iterable[str], layout: str) -> list[str]:
    """The layers a preset may choose from: only the UNet's where there is one, never its autoencoder's."""
    layers = list(layers)
    return [layer for layer in layers if to_canonical(layer, layout).startswith(_UNET)] or layers


def default_preset(layers: Iterable[str], layout: str) -> str | None:
    """The preset for a checkpoint whose user named no targets; None where none is the obvious one.

    Args:
        layers: native layer names.
        layout: the checkpoint's layout.

    >>> default_preset(["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"], "plain")
    'llama-qv'
    """
    if layout in ("sd15-ldm", "sd15-diffusers", "sd15-unet"):
        return "sd15-control"
    layers = list(layers)
    if layout != "plain":
        return None
    if any(layer.endswith(".attention.self.query_proj") for layer in layers):
        return "deberta-all"
    if all(any(layer.endswith(f".self_attn.{part}_proj") for layer in layers) for part in "qv"):
        return "llama-qv"
    return None
