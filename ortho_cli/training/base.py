"""Start from existing weights: `model.base` is any checkpoint, or a run of `ortho train`.

Every tensor of the model must be found, in its shape; what is left over in the base is said. Nothing is loaded
"as far as possible". A base that holds Householder adapters brings them along.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ortho_cli.checkpoints.reading import TensorReader
from ortho_cli.checkpoints.store import Checkpoint, open_checkpoint
from ortho_cli.checkpoints.tensors import TensorInfo
from ortho_cli.errors import CheckpointError
from ortho_cli.methods.load import hold_reflections
from ortho_cli.recipe.shipped import shipped

from .run_folder import RECIPE, best_or_last

__all__ = ["gone_base", "is_gone", "load_base", "open_base"]

LOCAL = ("runs/", "./", "../", "/", "~")  # how a path begins that no hub id is


def open_base(base: str) -> tuple[Checkpoint, dict[str, TensorInfo]]:
    """The weights a run starts from: of a run the best, else newest, averaged where it averages; or any checkpoint.

    Raises:
        CheckpointError: a run without a complete checkpoint, or whatever `open_checkpoint` refuses.
    """
    folder = Path(base).expanduser()
    reason = gone_base(base)
    if reason:
        raise CheckpointError(reason, hint=_how_to_make(base))
    if not (folder / RECIPE).is_file():
        checkpoint = open_checkpoint(base)
        return checkpoint, dict(checkpoint.tensors)
    found = best_or_last(folder)
    if found is None:
        raise CheckpointError(f"run {base} has no complete checkpoint", hint="train it first, or name another base")
    checkpoint = open_checkpoint(found / "model.safetensors")
    averaged = found / "ema.safetensors"
    return checkpoint, {
        **checkpoint.tensors,
        **(open_checkpoint(averaged).tensors if averaged.is_file() else {}),
    }


def gone_base(base: str | None) -> str:
    """Why a base that is meant to be here is not; empty where it is, or may be the hub's.

    `runs/x` could be a hub id, but is where a recipe puts a run.
    """
    if base is None or Path(base).expanduser().exists() or (_how_to_make(base) is None and not base.startswith(LOCAL)):
        return ""
    return f"{base} does not exist"


def _how_to_make(base: str) -> str | None:
    """The command that trains a run which a shipped recipe starts from."""
    wanted = base.rstrip("/")
    made = next((name for name in shipped() if f"runs/{name}" == wanted), None)
    return None if made is None else f"train it first: ortho train {made}"


def is_gone(base: str) -> bool:
    """Whether a base cannot be opened any more. A state that was saved since has all that was read from it."""
    try:
        open_base(base)
    except CheckpointError:
        return True
    return False


def load_base(model: nn.Module, base: str) -> list[str]:
    """Copy every tensor of a model from a base, in place.

    Returns:
        Names that the base has beyond the model's.

    Raises:
        CheckpointError: tensors are missing or of another shape; the message counts and names them.
    """
    checkpoint, tensors = open_base(base)
    filled = hold_reflections(model, checkpoint)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in filled}
    missing = [name for name in state if name not in tensors]
    wrong = [
        f"{name}: {tuple(tensor.shape)} here, {tensors[name].shape} there"
        for name, tensor in state.items()
        if name in tensors and tuple(tensor.shape) != tensors[name].shape
    ]
    if missing or wrong:
        first = wrong[0] if wrong else f"{missing[0]} is missing"
        raise CheckpointError(
            f"base {base} does not fit the model: {len(missing)} tensors missing, "
            f"{len(wrong)} of another shape ({first})",
            hint="was it trained with the same model section? compare with: ortho inspect BASE --layers",
            where=str(checkpoint.root),
        )
    with TensorReader() as reader, torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(reader.read(tensors[name]))
    return [name for name in tensors if name not in state]
