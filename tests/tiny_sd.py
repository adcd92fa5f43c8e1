"""A Stable Diffusion 1.5 that is small but complete: all 1,130 names, every kind of block, random weights.

diffusers and transformers initialise and save it themselves, so that what they read back is theirs, not ours.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch

WIDTHS = [16, 32, 64, 64]  # SD1.5: 320, 640, 1280, 1280
TEXT_WIDTH = 32
UNET = {
    "block_out_channels": WIDTHS, "cross_attention_dim": TEXT_WIDTH, "norm_num_groups": 8, "attention_head_dim": 4,
    "layers_per_block": 2, "sample_size": 8,
}  # fmt: skip
VAE = {
    "block_out_channels": [8, 16, 32, 32], "norm_num_groups": 4, "layers_per_block": 2, "latent_channels": 4,
    "sample_size": 64, "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
CLIP = {
    "hidden_size": TEXT_WIDTH, "intermediate_size": 64, "num_hidden_layers": 12, "num_attention_heads": 4,
    "projection_dim": TEXT_WIDTH, "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 1,
}  # fmt: skip
SCHEDULER = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
    "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip


def save_pipeline(folder: Path) -> Path:
    """Write the pipeline as diffusers saves it."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = _tokenizer(folder.parent / f"{folder.name}-vocabulary")
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(**VAE),
        text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **CLIP)),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**UNET),
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def _tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer that knows letters."""
    from transformers import CLIPTokenizer

    folder.mkdir()
    letters = [*string.ascii_lowercase, *(letter + "</w>" for letter in string.ascii_lowercase)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def paint(pipeline: Any) -> torch.Tensor:
    """What a pipeline draws of one prompt: the image, and the latents it is decoded from, as one vector."""
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 3, "height": 64, "width": 64, "guidance_scale": 3.0}
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = pipeline("a cat", latents=start, output_type="latent", **settings).images
    image = pipeline("a cat", latents=start, output_type="pt", **settings).images
    return torch.cat([latents.flatten(), image.flatten()])
