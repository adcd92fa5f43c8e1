"""Layouts told apart by names and shapes alone."""

from __future__ import annotations

import pytest
from sd15_shapes import CLIP, CLIP_FLAT, LDM, PIPELINE, UNET, VAE, Shapes, as_hra, old_vae

from ortho_cli.checkpoints.layouts import LDM_ONLY, detect, ema_name

SD2_LDM = {n: (*shape[:-1], 1024) if n.endswith("attn2.to_k.weight") else shape for n, shape in LDM.items()}


@pytest.mark.parametrize(
    ("tensors", "layout"),
    [
        (LDM, "sd15-ldm"),
        ({**LDM, **{ema_name(n): LDM[n] for n in LDM if n.startswith("model.diff")}}, "sd15-ldm"),
        ({n: s for n, s in LDM.items() if n not in LDM_ONLY}, "sd15-ldm"),
        ({n: s for n, s in LDM.items() if not n.startswith(("cond_", "first_"))}, "sd15-ldm"),
        (as_hra(LDM), "sd15-ldm"),
        ({**LDM, "model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3)}, "sd15-ldm"),
        (PIPELINE, "sd15-diffusers"),
        ({n.replace("text_model.", ""): s for n, s in PIPELINE.items()}, "sd15-diffusers"),
        (UNET, "sd15-unet"),
        ({n.replace("attn1.to_q.w", "attn1.to_q.fixed_linear.w"): s for n, s in UNET.items()}, "sd15-unet"),
        (VAE, "sd15-vae"),
        ({old_vae(n): s for n, s in VAE.items()}, "sd15-vae"),
        (CLIP, "sd15-text-encoder"),
        (CLIP_FLAT, "sd15-text-encoder"),
        ({**CLIP, "text_model.embeddings.position_ids": (1, 77)}, "sd15-text-encoder"),
    ],
)
def test_sd15(tensors: Shapes, layout: str) -> None:
    assert detect(tensors) == layout
    assert detect(dict(reversed(tensors.items()))) == layout


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"model.layers.0.self_attn.q_proj.weight": (4096, 4096), "lm_head.weight": (32000, 4096)},
        {"encoder.layer.0.attention.self.query.weight": (384, 384)},
        SD2_LDM,
        {n: s[:2] if n.endswith("proj_in.weight") else s for n, s in LDM.items()},  # SD2's linear proj_in
        {**LDM, "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight": (3072, 1024)},
        {**LDM, "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": (768,)},
        {**LDM, "model.diffusion_model.label_emb.0.0.weight": (1280, 2816)},
        {"model.diffusion_model.output_blocks.0.1.transformer_blocks.0.attn2.to_k.weight": (1280, 2048)},
        {"model.diffusion_model.output_blocks.0.1.transformer_blocks.0.attn2.to_k.weight": (16, 8)},
        {**PIPELINE, "text_encoder_2.text_model.final_layer_norm.weight": (1280,)},
        {**UNET, "add_embedding.linear_1.weight": (1280, 2816)},
        {n: (*s[:-1], 1024) if n.endswith("attn2.to_k.weight") else s for n, s in UNET.items()},
        {**UNET, "down_blocks.2.attentions.0.transformer_blocks.1.attn1.to_q.weight": (1280, 1280)},
        {n: s for n, s in VAE.items() if "quant_conv" not in n},  # Flux, SD3
        {**CLIP, "vision_model.post_layernorm.weight": (768,)},
        {**CLIP, "text_projection.weight": (768, 768)},
        {**CLIP, "text_model.embeddings.token_embedding.weight": (49408, 1024)},  # SD2's text encoder
        {n: s for n, s in LDM.items() if n.startswith("first_stage_model.")},
    ],
)
def test_not_sd15(tensors: Shapes) -> None:
    assert detect(tensors) == "plain"


def test_a_small_pipeline_with_the_same_grammar_is_diffusers() -> None:
    block = "unet.up_blocks.0.attentions.0."
    tensors = {
        block + "proj_in.weight": (8, 8, 1, 1),
        block + "transformer_blocks.0.attn2.to_k.weight": (8, 32),
        "text_encoder.encoder.layers.0.mlp.fc1.weight": (8, 8),
    }
    assert detect(tensors) == "sd15-diffusers"
