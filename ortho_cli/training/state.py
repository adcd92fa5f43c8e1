"""A training state on disk: safetensors for tensors, JSON for everything else, in a folder that appears whole.

    checkpoints/step-000500/model.safetensors       what trains, and what is needed to rebuild it
                            optimizer.safetensors   moments by parameter name, and the methods' tensors
                            ema.safetensors         where the recipe asks for one
                            state.json              step, epoch, counters, methods' state

No pickle is written or read, so a run can be resumed from anywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ortho_cli.checkpoints.output import atomic
from ortho_cli.checkpoints.reading import TensorReader, tensor_bytes
from ortho_cli.checkpoints.store import open_checkpoint, read_json
from ortho_cli.checkpoints.tensors import TORCH_DTYPES
from ortho_cli.checkpoints.writer import Piece, computed, write_file
from ortho_cli.errors import CheckpointError

from .snapshot import Snapshot

__all__ = [
    "BEST", "checkpoint_steps", "last_checkpoint", "load_tensors", "read_state", "save_state", "step_folder",
    "write_tensors",
]  # fmt: skip

SAFETENSORS_DTYPES = {name: dtype for dtype, name in TORCH_DTYPES.items()}
BEST = "best"  # the folder beside the steps' with the state that evaluated best


def step_folder(run: Path, step: int) -> Path:
    """Where the state after `step` steps lies.

    >>> step_folder(Path("run"), 500).as_posix()
    'run/checkpoints/step-000500'
    """
    return run / "checkpoints" / f"step-{step:06d}"


def checkpoint_steps(run: Path) -> list[int]:
    """The steps that were saved and are complete, ascending."""
    folder = run / "checkpoints"
    found = [re.fullmatch(r"step-(\d+)", path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(
        int(match[1]) for match in found if match and (step_folder(run, int(match[1])) / "state.json").is_file()
    )


def last_checkpoint(run: Path) -> Path | None:
    """The newest complete state of a run."""
    steps = checkpoint_steps(run)
    return step_folder(run, steps[-1]) if steps else None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors of any device to one safetensors file, one at a time."""
    write_file(path, [_piece(name, tensor) for name, tensor in tensors.items()], {"format": "pt", **(metadata or {})})


def _piece(name: str, tensor: Tensor) -> Piece:
    def produce() -> Iterator[Any]:
        yield tensor_bytes(tensor.detach().cpu())

    dtype = SAFETENSORS_DTYPES[str(tensor.dtype).removeprefix("torch.")]
    return computed(name, dtype, tuple(tensor.shape), produce)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, in memory of its own."""
    with TensorReader() as reader:
        return {name: reader.read_copy(info) for name, info in open_checkpoint(path).tensors.items()}


def save_state(folder: Path, snapshot: Snapshot) -> None:
    """Write one checkpoint folder; it is complete or absent.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    with atomic(folder) as partial:
        partial.mkdir()
        write_tensors(partial / "model.safetensors", snapshot.model)
        write_tensors(partial / "optimizer.safetensors", snapshot.moments)
        if snapshot.average is not None:
            write_tensors(partial / "ema.safetensors", snapshot.average)
        (partial / "state.json").write_text(json.dumps(snapshot.state, indent=2, sort_keys=True) + "\n", "utf-8")


def read_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint folder.

    Raises:
        CheckpointError: missing or damaged.
    """
    path = folder / "state.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is no checkpoint of a run: state.json is missing")
    return read_json(path)
