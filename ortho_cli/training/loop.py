"""The loop: one readable pass over steps, the same for every task and method.

It knows neither images nor text, neither adapters nor penalties: the task gives batches and a loss, methods act
through their hooks, accelerate cares for devices and processes. Randomness is stateless (a seed from the run's seed
and the step), so that a resumed run repeats an uninterrupted one bit for bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from .optimizers import clip_gradients, set_learning_rate
from .session import Session, prepare_training
from .window import Window

__all__ = ["Counters", "fit", "seed_generators", "step_seed"]

SEED_STRIDE = 1_000_003  # a prime, so that (seed, step, rank) do not collide in practice

Batch = dict[str, Tensor]


@dataclass
class Counters:
    """Where a run is; all of it goes into state.json."""

    step: int = 0
    epoch: int = 0
    batch: int = 0  # optimizer steps done in this epoch
    samples: int = 0
    best: float | None = None
    best_step: int | None = None
    since_best: int = 0

    def advance(self, samples: int, steps_per_epoch: int) -> None:
        """Count one step."""
        self.step, self.batch, self.samples = self.step + 1, self.batch + 1, self.samples + samples
        if self.batch == steps_per_epoch:
            self.epoch, self.batch = self.epoch + 1, 0


def fit(session: Session, counters: Counters, window: Window, after_step: Callable[[], bool]) -> None:
    """Train from where `counters` stand to the end of the recipe, or until `after_step` says stop.

    Args:
        session: prepared by `prepare_training`.
        counters: advanced in place.
        window: gets what each step says.
        after_step: logs, evaluates and saves where these are due; called by every process.

    Raises:
        NumericsError: a loss that is not finite, found by `after_step`; it says at which step.
    """
    session.model.train()
    while counters.step < session.total_steps:
        for parts in _steps(session, counters):
            seed = step_seed(session.recipe.train.seed, counters.step, session.accelerator.process_index)
            seed_generators(seed, session.accelerator.device)
            window.add(counters.step + 1, _step(session, counters.step, parts))
            if session.average is not None:
                session.average.update(session.model)
            samples = sum(map(_size, parts)) * session.accelerator.num_processes
            counters.advance(samples, session.steps_per_epoch)
            if after_step():
                return


def _steps(session: Session, counters: Counters) -> Iterator[list[Batch]]:
    """The rest of the current epoch: the parts of the batch, on this process, of one optimizer step after the other."""
    accelerator, recipe = session.accelerator, session.recipe
    accumulate = recipe.train.accumulate
    batches = session.task.batches(
        "train",
        0 if session.repeats_first_epoch else counters.epoch,
        batch=recipe.data.batch // accumulate,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        skip=counters.batch * accumulate,
        workers=recipe.data.workers,
    )
    for _ in range(session.steps_per_epoch - counters.batch):
        parts = [session.on_device(batch) for batch in itertools.islice(batches, accumulate)]
        if not parts:
            raise ValueError(f"the task gave fewer batches than the {session.steps_per_epoch} steps of an epoch")
        yield parts


def _step(session: Session, step: int, parts: list[Batch]) -> dict[str, Tensor]:
    """One optimizer step of each phase; what it has to say, still on the device."""
    accelerator, model, task = session.accelerator, session.wrapped, session.task
    assert model is not None
    shares = _shares(parts)
    said: dict[str, Tensor] = {}
    changed = False
    for phase, optimizer in session.optimizers.items():
        label = "train" if len(session.optimizers) == 1 else f"train/{phase}"
        own: dict[str, Tensor] = {}
        set_learning_rate(optimizer, session.schedule(step))
        optimizer.zero_grad()
        with session.training_only(phase):
            for index, (batch, share) in enumerate(zip(parts, shares, strict=True)):
                with nullcontext() if index == len(parts) - 1 else accelerator.no_sync(model):
                    with accelerator.autocast():
                        loss, outputs, named = task.loss(model, batch, phase)
                    penalties = {
                        f"method/{name}/penalty": value
                        for name, method in session.named_methods.items()
                        if (value := method.penalty(session.model, batch, outputs, phase)) is not None
                    }
                    whole = sum(penalties.values(), loss)
                    accelerator.backward(whole if share == 1 else share * whole)
                for name, value in {f"{label}/loss": loss, **_labelled(label, named), **penalties}.items():
                    _add(own, name, value.detach(), share)
        said |= own  # a penalty that several phases have is told once
        accelerator.unscale_gradients(optimizer)  # fp16 only: methods see gradients as they are
        for method in session.methods:
            method.after_backward(session.model, optimizer, phase)
        if session.recipe.train.clip is not None:
            said[f"{label}/gradient_norm"] = clip_gradients(optimizer, session.recipe.train.clip)
        optimizer.step()
        for method in session.methods:
            changed |= bool(method.after_step(session.model, optimizer, step, phase))
    if changed:
        prepare_training(session)
    return said


def _shares(parts: list[Batch]) -> list[float]:
    """The weight of each part's mean in the mean over all samples, whatever their sizes."""
    sizes = [_size(part) for part in parts]
    return [size / sum(sizes) for size in sizes]


def _size(batch: Batch) -> int:
    return next(len(value) for value in batch.values() if value.dim())


def _labelled(label: str, named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{label}/{name}": value for name, value in named.items()}


def _add(said: dict[str, Tensor], name: str, value: Tensor, share: float) -> None:
    value = value if share == 1 else share * value
    said[name] = said[name] + value if name in said else value


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed what this process draws from; `torch.manual_seed` would also queue a seed for every device not in use."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """The seed of everything random in one step of one process.

    >>> len({step_seed(0, 1), step_seed(0, 2), step_seed(1, 2), step_seed(0, 1, rank=1)})
    4
    """
    return (seed * SEED_STRIDE + step) * SEED_STRIDE % (2**63 - 1) + rank
