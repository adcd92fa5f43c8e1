"""What a Stable Diffusion is made of, whatever its base: configurations, tokenizer, schedule, and where weights lie.

Weights are read by our own reader under canonical names, so that LDM files, diffusers folders old and new, pickles,
runs and files with reflections inside are one case. diffusers and transformers only build the modules.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ortho_cli.checkpoints import layouts
from ortho_cli.checkpoints.checkpoint import Checkpoint
from ortho_cli.checkpoints.names import modern_name
from ortho_cli.checkpoints.reading import TensorReader
from ortho_cli.checkpoints.sd15_configs import SCHEDULER, WEIGHT_NAMES, companion_folder, component_config
from ortho_cli.checkpoints.store import open_checkpoint, read_json
from ortho_cli.checkpoints.tensors import TensorInfo
from ortho_cli.errors import CheckpointError, UsageError
from ortho_cli.recipe.shipped import shipped

__all__ = ["Parts", "base_parts", "random_parts", "read_weights"]

COMPONENTS = tuple(WEIGHT_NAMES)
LETTERS = string.ascii_lowercase + string.digits
# A Stable Diffusion that trains on a CPU: every kind of block, two pixels a latent, a text encoder of two layers.
TINY: dict[str, dict[str, Any]] = {
    "unet": {
        "block_out_channels": [16, 32], "cross_attention_dim": 32, "norm_num_groups": 8, "attention_head_dim": 2,
        "layers_per_block": 1, "sample_size": 8, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    },
    "vae": {
        "block_out_channels": [8, 16], "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4,
        "sample_size": 16, "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
    },
    "text_encoder": {
        "vocab_size": 2 + 2 * len(LETTERS), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "projection_dim": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
        "max_position_embeddings": 77,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """Configurations by component; the tensors of all of them by canonical name (none: random weights)."""

    configs: dict[str, dict[str, Any]]
    tokenizer: Any
    scheduler: Any
    weights: dict[str, TensorInfo] = field(default_factory=dict)
    where: str = ""
    notes: list[str] = field(default_factory=list)

    def modules(self) -> dict[str, Any]:
        """The three networks, on torch's default device, randomly initialised."""
        diffusers, transformers = _libraries()
        text = transformers.CLIPTextConfig.from_dict(self.configs["text_encoder"])
        return {
            "unet": diffusers.UNet2DConditionModel.from_config(self.configs["unet"]),
            "vae": diffusers.AutoencoderKL.from_config(self.configs["vae"]),
            "text_encoder": transformers.CLIPTextModel(text),
        }


def random_parts(size: str) -> Parts:
    """A Stable Diffusion without weights, of size `sd15` or `tiny`; the tiny one's tokenizer knows letters and digits.

    Raises:
        UsageError: diffusers or transformers is not installed.
    """
    if size == "tiny":
        return Parts(TINY, _letters(), _scheduler(SCHEDULER))
    folder = companion_folder(None)
    configs = {component: component_config(component, {}, None) for component in COMPONENTS}
    return Parts(configs, _tokenizer(folder), _scheduler(SCHEDULER))


def base_parts(base: str, config: str | None = None, *, headers_only: bool = False) -> Parts:
    """What a base consists of.

    Args:
        base: a file, a folder, a hub id, or a run.
        config: a diffusers folder or hub id with what a bare file lacks.
        headers_only: for a model without weights: a base that is not here is taken for what its name promises (the
            run of a shipped recipe), else for Stable Diffusion 1.5, with a note; no weight is downloaded.

    Raises:
        UsageError: diffusers or transformers is not installed.
        CheckpointError: not found, or a component is missing.
        TargetError: a bare file of other sizes than Stable Diffusion 1.5's, and no configuration.
    """
    run = _run_model(base)
    if run is not None:
        below = random_parts(run.size) if run.base is None else base_parts(run.base, run.config, headers_only=True)
        return replace(below, weights={}) if headers_only else _run_parts(base, run)
    if headers_only and not Path(base).expanduser().exists():
        return _unseen(base, config)
    checkpoint = open_checkpoint(base)
    folder = checkpoint.root if checkpoint.kind == "pipeline" else None
    companions = companion_folder(config, "model.config") if config is not None or folder is None else folder
    weights = dict(_canonical(checkpoint))
    shapes: dict[str, dict[str, tuple[int, ...]]] = {component: {} for component in COMPONENTS}
    for name, info in weights.items():
        component, _, local = name.partition(".")
        shapes[component][local] = layouts.canonical_shape(name, info.shape)
    absent = [component for component in COMPONENTS if not shapes[component]]
    if absent:
        raise CheckpointError(
            f"{checkpoint.root.name} has no {' and no '.join(absent)}, which Stable Diffusion consists of",
            hint="give a whole pipeline: an LDM file, a diffusers folder or a hub id",
            where=str(checkpoint.root),
        )
    own = folder or (companions if config is not None else None)
    configs = {component: component_config(component, shapes[component], own) for component in COMPONENTS}
    schedule = _schedule(folder) or _schedule(companions) or SCHEDULER
    tokenizer = _tokenizer(companions) or _tokenizer(folder)
    _check_vocabulary(tokenizer, configs["text_encoder"], str(companions))
    found = {} if headers_only else weights
    return Parts(configs, tokenizer, _scheduler(schedule), found, str(checkpoint.root), list(checkpoint.notes))


def read_weights(component: str, module: nn.Module, parts: Parts, dtype: torch.dtype) -> None:
    """Fill a component that was built on the meta device; its tensors are then its own, of one dtype.

    Raises:
        CheckpointError: tensors are missing or of another shape; the message counts and names them.
    """
    wanted = {name: modern_name(f"{component}.{name}") for name in module.state_dict()}
    held = module.state_dict()
    missing = [name for name, canonical in wanted.items() if canonical not in parts.weights]
    wrong = [
        name
        for name, canonical in wanted.items()
        if name not in missing
        and layouts.canonical_shape(canonical, parts.weights[canonical].shape) != tuple(held[name].shape)
    ]
    if missing or wrong:
        first = (missing or wrong)[0]
        there = "missing" if missing else f"{parts.weights[wanted[first]].shape} there, {tuple(held[first].shape)} here"
        raise CheckpointError(
            f"the {component} does not fit its configuration: {len(missing)} tensors missing, {len(wrong)} of another "
            f"shape, first {first}: {there}",
            hint="is the base complete? list it with: ortho inspect BASE",
            where=parts.where,
        )
    with TensorReader() as reader:
        filled = {
            name: reader.read(parts.weights[canonical]).to(dtype, copy=True).view(held[name].shape)
            for name, canonical in wanted.items()
        }
    module.load_state_dict(filled, assign=True)


def _canonical(checkpoint: Checkpoint) -> Iterator[tuple[str, TensorInfo]]:
    """The tensors of the three components; of a layer with reflections, those of the layer below them."""
    for name, info in checkpoint.tensors.items():
        canonical = modern_name(layouts.to_canonical(name.replace(".fixed_linear.", "."), checkpoint.layout))
        if canonical.startswith(tuple(f"{component}." for component in COMPONENTS)) and ".hra_" not in canonical:
            yield canonical, info


def _run_model(base: str) -> Any:
    """The model section of a run, or of the shipped recipe whose run this would be; None where it is neither."""
    from ortho_cli.recipe.train import load_train

    recipe = Path(base).expanduser() / "recipe.yaml"
    made = next((name for name in shipped() if f"runs/{name}" == base.rstrip("/")), None)
    if recipe.is_file() or (made is not None and not recipe.parent.exists()):
        model = load_train(recipe if recipe.is_file() else str(made)).model
        if model.name != "stable-diffusion":
            raise CheckpointError(f"run {base} is of the model {model.name}, not of Stable Diffusion")
        return model
    return None


def _run_parts(base: str, run: Any) -> Parts:
    """What a run trained, on what it started from; its own reflections are put on by who reads the base."""
    folder = Path(base).expanduser() / "checkpoints"
    saved = sorted(path.parent for path in folder.glob("*/state.json"))  # "best" stands before "step-..."
    best = [path for path in saved if path.name == "best"] or saved[-1:]
    if not best:
        raise CheckpointError(f"run {base} has no complete checkpoint", hint="train it first, or name another base")
    tensors: dict[str, TensorInfo] = {}
    for name in ("model.safetensors", "ema.safetensors"):
        if (best[0] / name).is_file():
            tensors |= open_checkpoint(best[0] / name).tensors
    if any(".lora_" in name for name in tensors):
        raise CheckpointError(
            f"run {base} trained a LoRA, which is no base",
            hint=f"start from its base, and go on with it: methods: [{{name: lora, adapter: {base}/export/lora}}]",
        )
    below = random_parts(run.size) if run.base is None else base_parts(run.base, run.config)
    own = {modern_name(name.replace(".fixed_linear.", ".")): info for name, info in tensors.items()}
    return replace(below, weights=below.weights | own, where=str(best[0]))


def _unseen(base: str, config: str | None) -> Parts:
    """A base that is not on this machine, by its configurations, or by Stable Diffusion 1.5's."""
    parts = random_parts("sd15")
    try:
        folder = companion_folder(config or base, "model.base")
    except CheckpointError:
        return replace(parts, notes=[f"{base} is not here; counted as Stable Diffusion 1.5"])
    return replace(parts, configs={component: component_config(component, {}, folder) for component in COMPONENTS})


def _libraries() -> tuple[Any, Any]:
    try:
        import diffusers
        import transformers
    except ImportError as error:
        raise UsageError(
            f"model stable-diffusion needs diffusers and transformers: {str(error).splitlines()[0][:200]}",
            hint="pip install 'ortho-cli[diffusion]'",
        ) from error
    return diffusers, transformers


def _tokenizer(folder: Path | None) -> Any:
    if folder is None or not (folder / "tokenizer").is_dir():
        return None
    try:
        return _libraries()[1].CLIPTokenizer.from_pretrained(folder / "tokenizer")
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(f"the tokenizer does not open: {reason}", where=str(folder / "tokenizer")) from error


def _letters() -> Any:
    """A CLIP tokenizer that spells."""
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    tokens = {word: number for number, word in enumerate(words)}
    return _libraries()[1].CLIPTokenizer(vocab=tokens, merges=[], model_max_length=77)


def _check_vocabulary(tokenizer: Any, text: Mapping[str, Any], where: str) -> None:
    """Refuse a tokenizer with more words than the text encoder has rows: looking them up would fail in the middle."""
    if tokenizer is not None and len(tokenizer) > text["vocab_size"]:
        raise CheckpointError(
            f"the tokenizer has {len(tokenizer):,} words, the text encoder {text['vocab_size']:,}",
            hint="name the folder whose tokenizer belongs to the base: model.config",
            where=where,
        )


def _schedule(folder: Path | None) -> dict[str, Any] | None:
    path = folder / "scheduler" / "scheduler_config.json" if folder is not None else None
    return read_json(path) if path is not None and path.is_file() else None


def _scheduler(config: Mapping[str, Any]) -> Any:
    """The noise of training, which keeps what only other schedulers know of; tables are made on the CPU always."""
    diffusers, _ = _libraries()
    with torch.device("cpu"):
        return diffusers.DDPMScheduler.from_config(dict(config))
