"""The loop: one readable pass over steps, the same for every task and method.

It knows neither images nor text, neither adapters nor penalties: the task gives batches and a loss, methods act
through their hooks, accelerate cares for devices and processes. Randomness is stateless (a seed from the run's seed
and the step), so that a resumed run repeats an uninterrupted one bit for bit.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ortho_cli.errors import NumericsError

from .session import Session, prepare_training

__all__ = ["Counters", "Hooks", "Window", "fit", "step_seed"]

SEED_STRIDE = 1_000_003  # a prime, so that (seed, step, rank) do not collide in practice
NEVER = -1


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


@dataclass
class Hooks:
    """What the caller wants done around the loop; each is called by every process."""

    on_metrics: Callable[[Counters, dict[str, float]], None] = lambda counters, values: None
    on_timing: Callable[[Counters, dict[str, float]], None] = lambda counters, values: None
    on_step_end: Callable[[Counters, bool], bool] = lambda counters, epoch_ended: False  # True stops the run
    ema: Any = None


def fit(session: Session, counters: Counters, hooks: Hooks, window: Window) -> None:
    """Train from where `counters` stand to the end of the recipe, or until a hook asks to stop.

    Raises:
        NumericsError: the loss is not finite; says at which step.
    """
    log_every = session.recipe.run.log_every
    while counters.step < session.total_steps:
        for micro_batches in _steps(session, counters):
            seed = step_seed(session.recipe.train.seed, counters.step, session.accelerator.process_index)
            torch.manual_seed(seed)
            _step(session, counters, micro_batches, window)
            if hooks.ema is not None:
                hooks.ema.update(session.model)
            counters.step += 1
            counters.batch += 1
            epoch_ended = counters.batch == session.steps_per_epoch
            if epoch_ended:
                counters.epoch, counters.batch = counters.epoch + 1, 0
            last = counters.step == session.total_steps
            if counters.step % log_every == 0 or epoch_ended or last:
                window.report(counters, hooks)
            if hooks.on_step_end(counters, epoch_ended or last) or last:
                return
            if epoch_ended:
                break


def _steps(session: Session, counters: Counters) -> Iterator[list[dict[str, Tensor]]]:
    """The rest of the current epoch, as lists of micro-batches that make one optimizer step."""
    accumulate = session.recipe.train.accumulate
    accelerator = session.accelerator
    batches = session.task.batches(
        "train",
        counters.epoch,
        batch=session.recipe.data.batch // accumulate,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        skip=counters.batch * accumulate,
        workers=session.recipe.data.workers,
    )
    left = session.steps_per_epoch - counters.batch
    for _ in range(left):
        found = list(itertools.islice(batches, accumulate))
        if not found:
            return
        yield [_moved(batch, accelerator.device) for batch in found]


def _moved(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    if device.type == "cpu":
        return batch
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def _step(session: Session, counters: Counters, micro_batches: list[dict[str, Tensor]], window: Window) -> None:
    """One optimizer step of each phase."""
    accelerator, model = session.accelerator, session.wrapped
    assert model is not None
    model.train()
    changed = False
    for phase, optimizer in session.optimizers.items():
        factor = session.schedule(counters.step)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        optimizer.zero_grad(set_to_none=True)
        for index, batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            with nullcontext() if last else accelerator.no_sync(model):
                with accelerator.autocast():
                    loss, outputs, named = session.task.loss(model, batch, phase)
                penalties = {
                    method.name: value
                    for method in session.methods
                    if (value := method.penalty(session.model, batch, outputs, phase)) is not None
                }
                whole = loss + sum(penalties.values()) if penalties else loss
                accelerator.backward(whole / len(micro_batches))
            window.add(phase, loss, named, penalties, batch)
        accelerator.unscale_gradients(optimizer)  # fp16 only: methods see gradients as they are
        for method in session.methods:
            method.after_backward(session.model, optimizer, phase)
        clip = session.recipe.train.clip
        if clip is not None:
            window.gradient_norm = accelerator.clip_grad_norm_(session.model.parameters(), clip)
        optimizer.step()
        for method in session.methods:
            changed |= bool(method.after_step(session.model, optimizer, counters.step, phase))
    counters.samples += session.recipe.data.batch
    if changed:
        prepare_training(session)


class Window:
    """Sums of the losses since the last report, kept on the device so that no step waits for another."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.started = time.perf_counter()
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.gradient_norm: Tensor | None = None

    def state(self) -> dict[str, Any]:
        """Sums and counts as JSON: float32 sums survive it bit for bit."""
        sums = {name: float(value) for name, value in self.sums.items()}
        return {"sums": sums, "counts": self.counts}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from saved sums."""
        device = self.session.accelerator.device
        self.sums = {name: torch.tensor(value, device=device) for name, value in state["sums"].items()}
        self.counts = dict(state["counts"])

    def add(
        self, phase: str, loss: Tensor, named: dict[str, Tensor], penalties: dict[str, Tensor], batch: dict[str, Tensor]
    ) -> None:
        prefix = "train" if len(self.session.task.phases) == 1 else f"train/{phase}"
        values = {f"{prefix}/loss": loss, **{f"{prefix}/{name}": value for name, value in named.items()}}
        values |= {f"method/{name}/penalty": value for name, value in penalties.items()}
        for name, value in values.items():
            held = value.detach().float()
            self.sums[name] = self.sums[name] + held if name in self.sums else held
            self.counts[name] = self.counts.get(name, 0) + 1

    def report(self, counters: Counters, hooks: Hooks) -> None:
        """Mean values since the last report to the hooks; a loss that is not finite ends the run here."""
        means = {
            name: self.session.accelerator.reduce(value / self.counts[name], "mean")
            for name, value in self.sums.items()
        }
        values = {name: float(value) for name, value in means.items()}
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        if broken:
            raise NumericsError(
                f"{broken[0]} is not finite at step {counters.step} (learning rate {self.learning_rate:.3g})",
                hint="lower the learning rate, add warm-up or train.clip; the last good state is kept",
            )
        if self.gradient_norm is not None:
            values["train/gradient_norm"] = float(self.gradient_norm)
        for method in self.session.methods:
            values |= {f"method/{method.name}/{name}": value for name, value in method.scalars().items()}
        values["train/lr"] = self.learning_rate
        now = time.perf_counter()
        steps = max(1, next(iter(self.counts.values()), 1) // self.session.recipe.train.accumulate)
        hooks.on_metrics(counters, values)
        hooks.on_timing(counters, {"steps_per_second": steps / max(now - self.started, 1e-9)})
        self.started = now
        self._clear()

    @property
    def learning_rate(self) -> float:
        optimizer = next(iter(self.session.optimizers.values()))
        return float(optimizer.param_groups[0]["lr"])


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """The seed of everything random in one step of one process.

    >>> step_seed(0, 1) != step_seed(0, 2) != step_seed(1, 2)
    True
    """
    return (seed * SEED_STRIDE + step) * SEED_STRIDE % (2**63 - 1) + rank
