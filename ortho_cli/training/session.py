"""Everything a run needs, built from its recipe in one fixed order: task, model, base weights, methods, optimizers.

The order is the contract: methods operate on the model before the optimizer exists, and on resume they first restore
the shapes they made, then weights are loaded, then the optimizer's moments.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ortho_cli import registry
from ortho_cli.errors import UsageError
from ortho_cli.methods.method import Context, Method

from . import schedule as schedules
from .optimizers import build_optimizer, parameter_groups

__all__ = ["Session", "build_model", "build_schedule", "open_session", "prepare_training"]

PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


@dataclass
class Session:
    """The parts of a run. `model` is the plain module, `wrapped` what is called (DDP, compiled)."""

    recipe: Any
    accelerator: Accelerator
    task: Any
    model: nn.Module
    methods: list[Method]
    steps_per_epoch: int
    total_steps: int
    schedule: schedules.Schedule
    wrapped: nn.Module | None = None
    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """The run directory."""
        return Path(self.recipe.run.dir)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return bool(self.accelerator.is_main_process)


def open_session(recipe: Any) -> Session:
    """Build task, model and methods of a recipe; no optimizer yet (see `prepare_training`).

    Raises:
        UsageError: several processes were started that do not know of each other.
        OrthoError: what the data, the base or a method's targets may raise.
    """
    accelerator = Accelerator(mixed_precision=PRECISION[recipe.train.precision], cpu=_wants_cpu())
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and accelerator.num_processes == 1:
        raise UsageError(
            f"{os.environ['WORLD_SIZE']} processes were started, but each would train alone",
            hint="start them with: accelerate launch -m ortho_cli train RECIPE; on CPUs set ACCELERATE_USE_CPU=true",
        )
    if recipe.train.threads is not None:
        torch.set_num_threads(recipe.train.threads)
    torch.manual_seed(recipe.train.seed)
    task = registry.resolve("tasks", recipe.task.name)(recipe.task, recipe.data, seed=recipe.train.seed)
    model = build_model(recipe, task)
    steps_per_epoch = task.steps_per_epoch
    if recipe.train.limit_batches is not None:
        steps_per_epoch = min(steps_per_epoch, recipe.train.limit_batches)
    total = recipe.train.steps or recipe.train.epochs * steps_per_epoch
    methods = [registry.resolve("methods", config.name)(config) for config in recipe.methods]
    context = Context(recipe.train.seed, total, recipe.task.name, recipe.model.base)
    for method in methods:
        method.prepare(model, context)
    schedule = build_schedule(recipe.schedule, total, steps_per_epoch)
    session = Session(recipe, accelerator, task, model, methods, steps_per_epoch, total, schedule)
    session.notes += [f"{method.name}: {note}" for method in methods for note in getattr(method, "notes", ())]
    return session


def build_model(recipe: Any, task: Any) -> nn.Module:
    """The recipe's model, with the weights of `model.base` where it names one."""
    model: nn.Module = task.build_model(recipe.model)
    if recipe.model.base is not None and recipe.model.name not in ("hf-image",):
        from .base import load_base

        load_base(model, recipe.model.base)
    if recipe.train.checkpoint_gradients:
        enable = getattr(model, "gradient_checkpointing_enable", None)
        if enable is None:
            raise UsageError(f"model {recipe.model.name} has no gradient checkpointing", hint="leave it out of train:")
        enable()
    return model


def prepare_training(session: Session) -> None:
    """Make the optimizers and wrap the model; again after a method changed parameters.

    The old wrapper is dropped first, so that its buckets are freed.
    """
    recipe, model, accelerator = session.recipe, session.model, session.accelerator
    session.wrapped = None
    accelerator.free_memory()
    model.to(accelerator.device)
    claimed = [group for method in session.methods for group in method.param_groups(model)]
    config = recipe.optimizer
    for phase in session.task.phases:
        groups = parameter_groups(
            session.task.phase_module(model, phase),
            config.weight_decay,
            decay_norms=config.decay_norms,
            claimed=claimed,
        )
        if not groups:
            raise UsageError(
                "nothing trains: every parameter is frozen", hint="add a method, or remove what freezes it"
            )
        optimizer = build_optimizer(config, groups)
        for group in optimizer.param_groups:
            group.setdefault("base_lr", group["lr"])
        session.optimizers[phase] = accelerator.prepare_optimizer(optimizer)
    compiled = torch.compile(model) if recipe.train.compile else model
    session.wrapped = accelerator.prepare_model(compiled)


def build_schedule(config: Any, total: int, steps_per_epoch: int) -> schedules.Schedule:
    """The schedule of a recipe as a function of the step."""
    warmup = config.warmup or round((config.warmup_ratio or 0.0) * total)
    made = {
        "constant": lambda: schedules.constant(),
        "linear": lambda: schedules.linear(total, warmup),
        "cosine": lambda: schedules.cosine(total, warmup, config.floor),
        "multistep": lambda: schedules.multistep([mark * steps_per_epoch for mark in config.at], config.factor),
        "inverse-sqrt": lambda: schedules.inverse_sqrt(warmup),
        "one-cycle": lambda: schedules.one_cycle(total),
    }[config.name]()
    return schedules.with_warmup(made, warmup)


def _wants_cpu() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
