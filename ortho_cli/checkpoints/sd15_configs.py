"""What a diffusers folder of Stable Diffusion 1.5 holds besides weights, as data.

Tokenizer and feature extractor are vocabulary files, not tables: they come from a folder or a hub id, or are missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ortho_cli.errors import CheckpointError, TargetError

from .hub import HubId, parse_hub_id
from .store import read_json

__all__ = ["COMPANIONS", "SCHEDULER", "WEIGHT_NAMES", "companion_folder", "component_config", "model_index"]

COMPANIONS = ("tokenizer", "scheduler", "feature_extractor")
HUB_BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
WEIGHT_NAMES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
DIFFUSERS_VERSION = "0.30.0"  # the oldest these configurations are written for

_UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel", "_diffusers_version": DIFFUSERS_VERSION, "act_fn": "silu",
    "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False,
    "cross_attention_dim": 768, "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
    "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}  # fmt: skip
_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL", "_diffusers_version": DIFFUSERS_VERSION, "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4, "in_channels": 3,
    "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3, "sample_size": 512,
    "scaling_factor": 0.18215, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
_TEXT: dict[str, Any] = {
    "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": 49408, "hidden_size": 768,
    "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 77,
    "hidden_act": "quick_gelu", "layer_norm_eps": 1e-05, "projection_dim": 768, "attention_dropout": 0.0,
    "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "initializer_factor": 1.0, "initializer_range": 0.02,
}  # fmt: skip
SCHEDULER: dict[str, Any] = {
    "_class_name": "PNDMScheduler", "_diffusers_version": DIFFUSERS_VERSION, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": False,
    "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None, "clip_sample": False,
}  # fmt: skip
# A tensor of each component, the axis that tells its size, and the size.
_TELLING = {
    "unet": ("conv_in.weight", 0, 320),
    "vae": ("encoder.conv_in.weight", 0, 128),
    "text_encoder": ("text_model.embeddings.token_embedding.weight", 1, 768),
}
_CLASSES = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
}


def component_config(component: str, shapes: Mapping[str, tuple[int, ...]], folder: Path | None) -> dict[str, Any]:
    """The `config.json` of one component: a folder's own, else SD1.5's for tensors of SD1.5's sizes.

    Raises:
        TargetError: the tensors are of another size, and no folder says which model they are.
    """
    if folder is not None and (folder / component / "config.json").is_file():
        return read_json(folder / component / "config.json")
    config = {"unet": _UNET, "vae": _VAE, "text_encoder": _TEXT}[component]
    name, axis, size = _TELLING[component]
    if name in shapes and shapes[name][axis] != size:
        raise TargetError(
            f"the {component} is not of Stable Diffusion 1.5's size: {name} is {shapes[name]}, with {size} expected",
            hint="give a diffusers folder whose config.json says its sizes (--base; in a recipe model.config)",
        )
    # Inpainting UNets have 9 input channels.
    return {**config, "in_channels": shapes["conv_in.weight"][1]} if "conv_in.weight" in shapes else dict(config)


def model_index(components: Iterable[str], folder: Path | None) -> dict[str, Any]:
    """The `model_index.json` of a pipeline that has these components; what is absent is written as null.

    Args:
        components: what the pipeline has.
        folder: where tokenizer and scheduler come from; its own index says of which classes they are.
    """
    have = set(components)
    known = folder / "model_index.json" if folder is not None else None
    theirs = read_json(known) if known is not None and known.is_file() else {}
    classes = {**_CLASSES, **{name: theirs[name] for name in COMPANIONS if (theirs.get(name) or [None])[0]}}
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": DIFFUSERS_VERSION}
    index |= {name: pair if name in have else [None, None] for name, pair in classes.items()}
    return {**index, "requires_safety_checker": False, "safety_checker": [None, None]}


def companion_folder(base: str | None, option: str = "--base") -> Path | None:
    """The folder to take tokenizer and scheduler from: the one given, else the hub cache's copy of SD1.5, else None.

    Args:
        base: a folder or hub id.
        option: what it was given as, for messages.

    Raises:
        CheckpointError: a base was given and is no folder of a pipeline, or cannot be fetched.
    """
    if base is not None:
        path = Path(base).expanduser()
        if not path.is_dir():
            hub = parse_hub_id(base)
            if hub is None:
                raise CheckpointError(f"{option} {base} is neither a folder nor a hub id")
            return _snapshot(hub, local_only=False)
        if not (path / "tokenizer").is_dir():
            raise CheckpointError(f"{path.name} has no tokenizer/ folder", hint=f"give a diffusers folder as {option}")
        return path
    return _snapshot(HubId(HUB_BASE), local_only=True)


def _snapshot(hub: Any, *, local_only: bool) -> Path | None:
    """Only the small companion folders and configurations of a pipeline on the hub, or of its cached copy."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["model_index.json", "*/config.json", *(f"{folder}/*" for folder in COMPANIONS)]
    try:
        return Path(
            snapshot_download(hub.repo, revision=hub.revision, allow_patterns=patterns, local_files_only=local_only)
        )
    except LocalEntryNotFoundError:
        if local_only:
            return None
        raise CheckpointError(
            f"{hub.repo} is not in the hub cache and the hub cannot be reached", hint="give a local diffusers folder"
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(f"{hub.repo} cannot be fetched: {str(error).strip().splitlines()[0][:200]}") from error
