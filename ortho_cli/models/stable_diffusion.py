"""Stable Diffusion as one module: `unet`, `vae` and `text_encoder` are diffusers' and transformers' own.

Layers have their names in diffusers, with the component in front (`unet.down_blocks.0...`): every preset and pattern
means the same layers as in a checkpoint. What may be a base, and how it is read, is `stable_diffusion_files.py`.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ortho_cli.errors import UsageError

from .hf_base import silent
from .hint_encoder import CONTROL, hint_added
from .stable_diffusion_files import Parts, base_parts, random_parts, read_weights

if TYPE_CHECKING:
    from ortho_cli.recipe.models_diffusion import StableDiffusion as StableDiffusionConfig

__all__ = ["StableDiffusion", "build", "draw_latents", "open_stable_diffusion"]

COMPONENTS = ("unet", "vae", "text_encoder")


class StableDiffusion(nn.Module):
    """A UNet that predicts noise, the autoencoder whose latents it works in, and the text encoder it listens to.

    Autoencoder and text encoder are frozen from the start; adapters of the text encoder train all the same.

    Args:
        unet: diffusers' `UNet2DConditionModel`.
        vae: diffusers' `AutoencoderKL`.
        text_encoder: transformers' `CLIPTextModel`.
        tokenizer: transformers' `CLIPTokenizer`; None where none was found, which `tokens` then says.
        scheduler: diffusers' `DDPMScheduler`, as the base was trained with.
        notes: what the user should know about how it was loaded.

    Shapes: noisy latents `(B, 4, h, w)`, timesteps `(B,)` and the text (token ids `(B, L)` or the encoder's output
    `(B, L, d)`) to the prediction `(B, 4, h, w)` in float32; with a hint encoder (`add_hint_encoder`) also of a hint
    `(B, 3, 8h, 8w)`.
    """

    alphas_cumprod: Tensor

    def __init__(
        self,
        unet: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any = None,
        scheduler: Any = None,
        notes: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.unet, self.vae, self.text_encoder = unet, vae, text_encoder
        self.tokenizer, self.scheduler = tokenizer, scheduler
        self.notes = notes or []
        self.register_buffer(
            "alphas_cumprod", scheduler.alphas_cumprod.to(torch.get_default_device()), persistent=False
        )
        self.vae.requires_grad_(False)
        self.text_encoder.requires_grad_(False)

    @property
    def latent_factor(self) -> int:
        """Pixels of a picture for one of the latents."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def prediction_type(self) -> str:
        """What the UNet was trained to predict: `epsilon` or `v_prediction`."""
        return str(self.scheduler.config.prediction_type)

    def gradient_checkpointing_enable(self) -> None:
        """Let UNet and text encoder recompute their activations in backward."""
        self.unet.enable_gradient_checkpointing()
        new: Any = getattr(self.text_encoder, "activation_checkpointing_enable", None)  # from transformers 5 on
        (new or self.text_encoder.gradient_checkpointing_enable)()

    def forward(self, noisy: Tensor, timesteps: Tensor, text: Tensor, hint: Tensor | None = None) -> Tensor:
        if not text.is_floating_point():
            text = self.encode_text(text)
        own = self.unet.conv_in.weight.dtype  # adapters are in float32 whatever the base is in
        features = None if hint is None else self.get_submodule(CONTROL)(hint)
        with nullcontext() if features is None else hint_added(self.unet.conv_in, features):
            predicted: Tensor = self.unet(noisy.to(own), timesteps, encoder_hidden_states=text.to(own)).sample
        return predicted.float()

    def encode_text(self, tokens: Tensor) -> Tensor:
        """The text encoder's last hidden states `(B, L, d)` of token ids `(B, L)`; with a graph where it trains."""
        hidden: Tensor = self.text_encoder(tokens).last_hidden_state
        return hidden

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """Mean and standard deviation of the latents of pictures: `(B, 3, H, W)` in [-1, 1] to `(B, 2, 4, h, w)`.

        In the scale that the UNet works in; float32. `draw_latents` draws from them.
        """
        found = self.vae.encode(pictures.to(self.vae.encoder.conv_in.weight.dtype)).latent_dist
        config = self.vae.config
        shift = getattr(config, "shift_factor", None) or 0.0
        moments: Tensor = torch.stack([found.mean.float() - shift, found.std.float()], dim=1) * config.scaling_factor
        return moments

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pictures `(B, 3, H, W)` in [-1, 1], float32, of latents `(B, 4, h, w)` in the UNet's scale."""
        config = self.vae.config
        shift = getattr(config, "shift_factor", None) or 0.0
        pictures: Tensor = self.vae.decode(
            (latents / config.scaling_factor + shift).to(self.vae.decoder.conv_in.weight.dtype)
        ).sample
        return pictures.float().clamp(-1, 1)

    def tokens(self, prompts: list[str]) -> Tensor:
        """Token ids `(B, L)` of prompts, padded and cut to the encoder's length.

        Raises:
            UsageError: there is no tokenizer.
        """
        if self.tokenizer is None:
            raise UsageError(
                "the base is a bare file, and no tokenizer was found for it",
                hint="hf download stable-diffusion-v1-5/stable-diffusion-v1-5 --include 'tokenizer/*' 'scheduler/*'; "
                "or name a diffusers folder: model.config",
            )
        length = self.text_encoder.config.max_position_embeddings
        made = self.tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        ids: Tensor = made.input_ids
        return ids

    def pipeline(self, scheduler: Any = None) -> Any:
        """A diffusers `StableDiffusionPipeline` of these very modules, to draw with; no progress bar, no filter.

        Args:
            scheduler: a diffusers scheduler; None: DDIM, set up as the base's.
        """
        import diffusers
        import transformers

        library: Any = diffusers
        with silent(transformers):  # importing a pipeline warns of image processors that none of ours has
            build_pipeline = library.StableDiffusionPipeline
        made = build_pipeline(
            vae=self.vae, text_encoder=self.text_encoder, tokenizer=self.tokenizer, unet=self.unet,
            scheduler=scheduler or library.DDIMScheduler.from_config(self.scheduler.config), safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        made.set_progress_bar_config(disable=True)
        return made


def draw_latents(moments: Tensor, noise: Tensor) -> Tensor:
    """Latents `(B, 4, h, w)` of a picture's distribution `(B, 2, 4, h, w)`, drawn with standard normal `noise`."""
    return moments[:, 0] + moments[:, 1] * noise


def open_stable_diffusion(
    base: str, *, config: str | None = None, dtype: torch.dtype = torch.float32
) -> StableDiffusion:
    """Open Stable Diffusion from any base; on the meta device its architecture alone.

    Reflections that the base itself holds are not put on: `methods.load.hold_reflections` does that, with the same
    checkpoint. Their layers get the weights below them.

    Args:
        base: an LDM .safetensors or .ckpt file, a diffusers folder, a hub id, or a run that trained all weights.
        config: a diffusers folder or hub id with what a bare file lacks; None: Stable Diffusion 1.5's, from the cache.
        dtype: of all weights.

    Raises:
        UsageError: diffusers or transformers is not installed.
        CheckpointError: not found, a component is missing, or tensors that its configuration does not explain.
        TargetError: a bare file of other sizes than Stable Diffusion 1.5's, and no configuration.

    Cost: reads each weight once, through a buffer; no second copy of the model is made.
    """
    parts = base_parts(base, config, headers_only=torch.get_default_device().type == "meta")
    return _assembled(parts, dtype)


def build(config: StableDiffusionConfig) -> StableDiffusion:
    """The model of a recipe's `model` section; its weights in float32 until what is frozen is known.

    Raises:
        OrthoError: as `open_stable_diffusion`.
    """
    if config.base is not None:
        return open_stable_diffusion(config.base, config=config.config)
    return _assembled(random_parts(config.size), torch.float32)


def _assembled(parts: Parts, dtype: torch.dtype) -> StableDiffusion:
    """Build the modules of some parts, and fill them from where the parts say that weights are."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False) if parts.weights else nullcontext():
        modules = parts.modules()
    model = StableDiffusion(**modules, tokenizer=parts.tokenizer, scheduler=parts.scheduler, notes=parts.notes)
    if parts.weights:
        for name in COMPONENTS:
            read_weights(name, modules[name], parts, dtype)
    return model
