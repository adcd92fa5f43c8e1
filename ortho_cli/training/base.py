"""Start from existing weights: `model.base` is any checkpoint, or a run of `ortho train`.

Every tensor of the model must be found, in its shape; what is left over in the base is listed. Nothing is loaded
"as far as possible".
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ortho_cli.checkpoints.reading import TensorReader
from ortho_cli.checkpoints.store import Checkpoint, open_checkpoint
from ortho_cli.errors import CheckpointError

from .state import last_checkpoint

__all__ = ["load_base", "open_base"]


def open_base(base: str) -> Checkpoint:
    """The weights a run starts from: a run's best, else newest, state; or any checkpoint argument.

    Raises:
        CheckpointError: a run without a complete checkpoint, or whatever `open_checkpoint` refuses.
    """
    folder = Path(base).expanduser()
    if (folder / "recipe.yaml").is_file() and (folder / "checkpoints").is_dir():
        best = folder / "checkpoints" / "best"
        found = best if best.is_dir() else last_checkpoint(folder)
        if found is None:
            raise CheckpointError(f"run {base} has no complete checkpoint", hint="train it first, or name another base")
        return open_checkpoint(found / "model.safetensors")
    return open_checkpoint(base)


def load_base(model: nn.Module, base: str) -> None:
    """Copy every tensor of a model from a base, in place.

    Raises:
        CheckpointError: tensors are missing or of another shape; the message counts and names them.
    """
    checkpoint = open_base(base)
    state = model.state_dict()
    missing = [name for name in state if name not in checkpoint.tensors]
    wrong = [
        f"{name}: {tuple(tensor.shape)} here, {checkpoint.tensors[name].shape} there"
        for name, tensor in state.items()
        if name in checkpoint.tensors and tuple(tensor.shape) != checkpoint.tensors[name].shape
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
            tensor.copy_(reader.read(checkpoint.tensors[name]))
