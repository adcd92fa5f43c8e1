"""Everything a run needs, built from its recipe in one fixed order: task, model, base weights, methods, optimizers.

The order is the contract: methods operate on the model before the optimizer exists, and on resume they first restore
the shapes they made, then weights are loaded, then the optimizer's moments.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ortho_cli import registry
from ortho_cli.errors import RecipeError, UsageError
from ortho_cli.methods.inject import inner_model
from ortho_cli.methods.load import hold_reflections
from ortho_cli.methods.method import Context, Method
from ortho_cli.tasks.task import Task

from .base import is_gone, load_base, open_base
from .base_weights import BaseWeights
from .ema import Average
from .optimizers import build_optimizer, keep_moments, parameter_groups, set_learning_rate
from .processes import on_main, open_accelerator
from .recompute import recompute_activations
from .schedule import Schedule, build_schedule

__all__ = ["Session", "build_model", "check_best", "open_session", "prepare_training", "shrink_frozen"]


@dataclass
class Session:
    """The parts of a run. `model` is the plain module, `wrapped` what is called (DDP, compiled)."""

    recipe: Any
    accelerator: Accelerator
    task: Task
    model: nn.Module
    methods: list[Method]
    steps_per_epoch: int
    total_steps: int
    schedule: Schedule
    average: Average | None = None
    base: BaseWeights | None = None
    wrapped: nn.Module | None = None
    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    repeats_first_epoch: bool = False
    """Whether every epoch has the first one's batches, to see if they can be learnt by heart."""

    def __post_init__(self) -> None:
        counted: Counter[str] = Counter()
        self.named_methods: dict[str, Method] = {}
        for method in self.methods:
            counted[method.name] += 1
            suffix = f"-{counted[method.name]}" if counted[method.name] > 1 else ""
            self.named_methods[method.name + suffix] = method

    @property
    def folder(self) -> Path:
        """The run directory."""
        return Path(self.recipe.run.dir)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return bool(self.accelerator.is_main_process)

    @property
    def learning_rate(self) -> float:
        """Of the first phase's first group."""
        return float(next(iter(self.optimizers.values())).param_groups[0]["lr"])

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of each weight, so that all must help to read one."""
        return any(hasattr(parameter, "full_tensor") for parameter in self.model.parameters())

    @property
    def makes_samples(self) -> bool:
        """Whether the task has something to show."""
        return type(self.task).samples is not Task.samples

    @contextmanager
    def for_judging(self) -> Iterator[nn.Module]:
        """The model as it is judged: averaged weights where there are any, no dropout, no graph."""
        model = self.wrapped if self.wrapped is not None else self.model
        swapped = self.average.swapped(self.model) if self.average is not None else nullcontext()
        model.eval()
        with swapped, torch.no_grad(), self.accelerator.autocast():
            yield model
        model.train()

    @contextmanager
    def training_only(self, phase: str) -> Iterator[None]:
        """The model with all that a phase does not train frozen, so that nothing is computed or reduced for it."""
        if len(self.optimizers) == 1:
            yield
            return
        own = {id(parameter) for parameter in self.task.phase_module(self.model, phase).parameters()}
        others = [each for each in self.model.parameters() if each.requires_grad and id(each) not in own]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    def on_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch where the model is."""
        device = self.accelerator.device
        if device.type == "cpu":
            return batch
        return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def open_session(
    recipe: Any,
    accelerator: Accelerator | None = None,
    *,
    judging: bool = False,
    drawing: bool = False,
    kept: Path | None = None,
) -> Session:
    """Build task, model and methods of a recipe; no optimizer yet (see `prepare_training`).

    With `judging` a saved state follows and nothing is trained: what the run learnt from (a teacher, recorded norms)
    is not read, and a base that has gone is not missed; with `drawing`, too, the data is not opened. `kept` is the
    folder of a run, for what its task keeps there.

    Raises:
        OrthoError: what `open_accelerator`, the data, the base or a method's targets may raise.
    """
    accelerator = accelerator or open_accelerator(recipe)
    if recipe.train.threads is not None:
        torch.set_num_threads(recipe.train.threads)
    torch.manual_seed(recipe.train.seed)
    task = registry.resolve("tasks", recipe.task.name)(recipe.task, recipe.data, seed=recipe.train.seed)
    if kept is not None:
        task.recall(kept)
    model, left_over = build_model(recipe, task, judging=judging)
    base = BaseWeights(model, recipe.model.base) if recipe.model.is_its_base and recipe.model.base else None
    made = [] if judging else gather(task, model, accelerator)
    steps_per_epoch = 1 if drawing else min(task.steps_per_epoch, recipe.train.limit_batches or task.steps_per_epoch)
    total = recipe.train.steps or recipe.train.epochs * steps_per_epoch
    methods = [registry.resolve("methods", config.name)(config) for config in recipe.methods]
    context = Context(
        recipe.train.seed, total, recipe.task.name, recipe.model.base,
        None if judging else lambda section: build_model(recipe.model_copy(update={"model": section}), task)[0],
        task.phases,
    )  # fmt: skip
    for method in methods:
        method.prepare(model, context)
    shrink_frozen(model, getattr(recipe.model, "frozen", "fp32"))
    check_best(recipe, task)
    schedule = build_schedule(recipe.schedule, total, steps_per_epoch)
    average = Average(recipe.train.ema, task.judged) if recipe.train.ema is not None else None
    if average is not None:
        for method in methods:
            method.follow(average.carry)
    session = Session(recipe, accelerator, task, model, methods, steps_per_epoch, total, schedule, average, base)
    session.notes += [f"{method.name}: {note}" for method in methods for note in getattr(method, "notes", ())]
    session.notes += [f"model: {note}" for note in getattr(model, "notes", ())] + made
    if left_over:
        session.notes.append(f"model.base: {len(left_over)} of its tensors are not used, first {left_over[0]}")
    if (recipe.run.samples_every or recipe.run.samples_every_steps) and not session.makes_samples:
        session.notes.append(f"run.samples_every: task {recipe.task.name} has no samples to show")
    return session


def gather(task: Task, model: nn.Module, accelerator: Accelerator) -> list[str]:
    """What the task makes of the base for want of data, made by the main process while the others wait."""
    made: list[str] = []
    if type(task).gather is not Task.gather:
        model.to(accelerator.device)
        on_main(accelerator, lambda: made.extend(task.gather(model)))
    return made


def shrink_frozen(model: nn.Module, precision: str) -> None:
    """Keep weights that do not train in `bf16` or `fp16`; what trains stays in float32, and `fp32` changes nothing."""
    if precision == "fp32":
        return
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def check_best(recipe: Any, task: Any) -> None:
    """Refuse a metric to choose the best by that the task does not have, before it is trained for.

    Raises:
        RecipeError: with the nearest.
    """
    best = recipe.run.best
    known = [f"eval/{name}" for name in task.metrics]
    if best is not None and known and best.metric not in known:
        near = difflib.get_close_matches(best.metric, known, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise RecipeError(f"run.best.metric {best.metric} is not evaluated", hint=f"{hint}known: {', '.join(known)}")


def build_model(recipe: Any, task: Any, *, judging: bool = False) -> tuple[nn.Module, list[str]]:
    """The recipe's model with the weights of `model.base` where it names one, and what that base has beyond them.

    Raises:
        CheckpointError: the base does not fit.
        UsageError: gradient checkpointing of a model that cannot have it.
    """
    own_base = recipe.model.is_its_base and recipe.model.base is not None
    checkpoint = open_base(recipe.model.base)[0] if own_base else None
    model: nn.Module = task.build_model(recipe.model)
    left_over: list[str] = []
    if checkpoint is not None:  # the builder has loaded it, but for an adapter that the base holds
        hold_reflections(inner_model(model), checkpoint)
        task.take_over(model, checkpoint)
    elif recipe.model.base is not None and not (judging and is_gone(recipe.model.base)):
        left_over = load_base(model, recipe.model.base)
    if recipe.train.checkpoint_gradients:
        recompute_activations(model)
    return model, left_over


def prepare_training(session: Session) -> None:
    """Make the optimizers and wrap the model; again after a method changed parameters.

    The old wrapper is dropped first, so that its buckets are freed; moments of parameters that stayed are kept.

    Raises:
        UsageError: nothing trains.
    """
    recipe, model, accelerator = session.recipe, session.model, session.accelerator
    before = dict(session.optimizers)
    if session.wrapped is not None:
        accelerator.unwrap_model(session.wrapped, keep_fp32_wrapper=False)
    session.wrapped = None
    accelerator.free_memory()
    model.to(accelerator.device)
    claimed = [group for method in session.methods for group in method.param_groups(model)]
    optimizers = []
    for phase in session.task.phases:
        module = session.task.phase_module(model, phase)
        decay, decay_norms = recipe.optimizer.weight_decay, recipe.optimizer.decay_norms
        groups = parameter_groups(module, decay, decay_norms=decay_norms, claimed=claimed)
        if not groups:
            raise UsageError(
                "nothing trains: every parameter is frozen", hint="add a method, or remove what freezes it"
            )
        optimizers.append(build_optimizer(recipe.optimizer, groups))
        session.notes += [note for note in getattr(optimizers[-1], "notes", ()) if note not in session.notes]
    compiled = torch.compile(model) if recipe.train.compile else model
    session.wrapped, *prepared = accelerator.prepare(compiled, *optimizers)
    if accelerator.scaler is None:  # accelerate's wrapper serves the scaler of fp16, and costs 0.3 ms a step
        prepared = [wrapper.optimizer for wrapper in prepared]
    session.optimizers = dict(zip(session.task.phases, prepared, strict=True))
    for phase, old in before.items():
        new = session.optimizers[phase]
        keep_moments(old, new)
        first = old.param_groups[0]
        set_learning_rate(new, first["lr"] / first["base_lr"])  # where the schedule stands, to log and to save
