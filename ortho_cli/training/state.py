"""A training state on disk: safetensors for tensors, JSON for everything else, in a folder that appears whole.

    checkpoints/step-000500/model.safetensors       what trains, and what is needed to rebuild it
                            optimizer.safetensors   moments, by parameter name
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

import torch
from torch import Tensor, nn

from ortho_cli.checkpoints.output import atomic
from ortho_cli.checkpoints.reading import TensorReader, tensor_bytes
from ortho_cli.checkpoints.store import open_checkpoint, read_json
from ortho_cli.checkpoints.tensors import TORCH_DTYPES
from ortho_cli.checkpoints.writer import Piece, computed, write_file
from ortho_cli.errors import CheckpointError

__all__ = [
    "checkpoint_steps",
    "flatten_optimizer",
    "last_checkpoint",
    "load_tensors",
    "read_state",
    "restore_optimizer",
    "save_state",
    "step_folder",
    "write_tensors",
]

SAFETENSORS_DTYPES = {name: dtype for dtype, name in TORCH_DTYPES.items()}
SEPARATOR = "|"  # between a parameter's name, which has dots, and the moment's


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


def save_state(
    folder: Path,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    ema: Mapping[str, Tensor] | None = None,
) -> None:
    """Write one checkpoint folder; it is complete or absent.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    with atomic(folder) as partial:
        partial.mkdir()
        write_tensors(partial / "model.safetensors", model)
        write_tensors(partial / "optimizer.safetensors", optimizer)
        if ema is not None:
            write_tensors(partial / "ema.safetensors", ema)
        (partial / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True) + "\n", "utf-8")


def flatten_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's moments as named tensors, and its numbers as JSON."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for parameter, state in optimizer.state.items():
        name = names[id(parameter)]
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{name}{SEPARATOR}{key}"] = value
            elif value is not None:
                numbers[f"{name}{SEPARATOR}{key}"] = value
    keys = [key for key in optimizer.param_groups[0] if key != "params"] if optimizer.param_groups else []
    groups = [{key: group[key] for key in keys if _is_number(group.get(key))} for group in optimizer.param_groups]
    return tensors, {"state": numbers, "groups": groups}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def restore_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> None:
    """Put saved moments back, each on its parameter's device and in the dtype it was saved in.

    Raises:
        CheckpointError: a moment belongs to a parameter the model does not have.
    """
    parameters = dict(model.named_parameters())
    for flat, value in [*tensors.items(), *numbers["state"].items()]:
        name, _, key = flat.rpartition(SEPARATOR)
        if name not in parameters:
            raise CheckpointError(f"the saved optimizer has a moment for {name!r}, which the model lacks")
        parameter = parameters[name]
        # torch keeps its step counters on the CPU; everything of the parameter's shape lives beside it.
        placed = value.to(parameter.device) if isinstance(value, Tensor) and value.dim() else value
        optimizer.state[parameter][key] = placed
    for group, saved in zip(optimizer.param_groups, numbers["groups"], strict=True):
        group.update(saved)


def read_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint folder.

    Raises:
        CheckpointError: missing or damaged.
    """
    path = folder / "state.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is no checkpoint of a run: state.json is missing")
    return read_json(path)
