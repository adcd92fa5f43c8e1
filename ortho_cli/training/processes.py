"""One process or many: opening accelerate, and the few moments in which processes must agree."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, ProjectConfiguration, broadcast_object_list

from ortho_cli import registry
from ortho_cli.errors import OrthoError, RecipeError, UsageError

__all__ = ["agreed", "is_first", "leave", "on_main", "open_accelerator", "own_place"]

PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
ENGINES = {DistributedType.DEEPSPEED: "DeepSpeed", DistributedType.MEGATRON_LM: "Megatron-LM"}


def open_accelerator(recipe: Any) -> Accelerator:
    """Meet the other processes, on the device and in the precision that the recipe asks for.

    Raises:
        UsageError: several processes that do not know of each other, a tracker that is not installed, or an engine
            that keeps weights in a form of its own.
        RecipeError: fp16 on a CPU.
    """
    trackers = list(recipe.run.trackers)
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"run.trackers: {name} is not installed", hint=f"pip install {name.replace('_', '-')}")
    AcceleratorState._reset_state()  # of an earlier run in this process, which may have had another precision
    phases = registry.resolve("tasks", recipe.task.name).phases
    accelerator = Accelerator(
        mixed_precision=PRECISION[recipe.train.precision],
        log_with=trackers or None,
        project_config=ProjectConfiguration(project_dir=recipe.run.dir, logging_dir=f"{recipe.run.dir}/trackers"),
        # A phase trains a part of the model and leaves the rest without gradients.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=len(phases) > 1)],
    )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and accelerator.num_processes == 1:
        raise UsageError(
            f"{world} processes were started, but each would train alone",
            hint="start them with: accelerate launch -m ortho_cli train RECIPE; on CPUs set ACCELERATE_USE_CPU=true",
        )
    engine = ENGINES.get(accelerator.distributed_type)
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        engine = "FSDP version 1"
    if engine is not None:
        raise UsageError(
            f"{engine} keeps weights in a form of its own, which methods and checkpoints cannot read",
            hint="use DDP, or FSDP with fsdp_version: 2 (accelerate config)",
        )
    if recipe.train.precision == "fp16" and accelerator.device.type == "cpu":
        raise RecipeError(
            "train.precision fp16 needs a GPU, and this run is on the CPU", hint="--set train.precision=bf16, or fp32"
        )
    return accelerator


def on_main(accelerator: Accelerator, action: Callable[[], object]) -> None:
    """Let the main process act while the others wait; what it refuses, all refuse.

    Raises:
        OrthoError: what `action` raised, in every process.
    """
    failure: list[OrthoError | None] = [None]
    if accelerator.is_main_process:
        try:
            action()
        except OrthoError as error:
            failure = [error]
    if accelerator.num_processes > 1:
        broadcast_object_list(failure)
    if failure[0] is not None:
        raise failure[0]


def agreed(accelerator: Accelerator, flag: bool) -> bool:
    """Whether any process says so; every process must ask."""
    if accelerator.num_processes == 1:
        return flag
    said = torch.tensor(float(flag), device=accelerator.device)
    return bool(accelerator.reduce(said, "sum") > 0)


@contextmanager
def own_place(accelerator: Accelerator, target: Path) -> Iterator[Path]:
    """Where a process writes what all must compute together: the main one to `target`, others to what vanishes."""
    if accelerator.is_main_process:
        yield target
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / target.name


def is_first() -> bool:
    """Whether this process is the one that talks, before and after they meet."""
    return os.environ.get("RANK", "0") == "0"


def leave() -> None:
    """Part from the other processes, in good order."""
    if PartialState._shared_state:
        PartialState().destroy_process_group()
