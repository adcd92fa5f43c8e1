"""What happens around the steps of a run: logs, evaluation, samples, the best state, saving, pruning, restoring."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ortho_cli.checkpoints.output import atomic
from ortho_cli.errors import RecipeError

from .log import JsonLines, finite, read_lines
from .loop import Counters
from .processes import agreed, on_main, own_place
from .session import Session, prepare_training
from .snapshot import (
    Snapshot,
    capture,
    check_finite,
    held_as_parameters,
    load_methods,
    load_model,
    load_optimizer,
    without_prefix,
)  # fmt: skip
from .state import BEST, checkpoint_steps, load_tensors, read_state, save_state, step_folder
from .window import Window, check_number

__all__ = ["Keeper", "evaluate_model"]

PLACE = ("step", "epoch", "samples")  # in every line of metrics.jsonl


class Keeper:
    """Logs, evaluates, remembers the best, saves and restores; `after_step` is what the loop calls.

    Args:
        session: of the run.
        observer: gets `total(steps, done)`, `metrics(counters, values)`, `timing(counters, values)` and, when a signal
            asked to stop, `stopping()`; None: nobody.
    """

    def __init__(self, session: Session, observer: Any = None) -> None:
        self.session, self.observer = session, observer
        self.counters = Counters()
        self.window = Window(session.accelerator)
        self.last_metrics: dict[str, float | None] = {}
        self.stop_asked = False  # by a signal, in this process
        self.stopped = False  # by a signal, agreed
        self._metrics: JsonLines | None = None
        self._timing: JsonLines | None = None
        self._resumed_at: int | None = None

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do: all steps are done, or patience is over."""
        best = self.session.recipe.run.best
        waited = best is not None and best.patience is not None and self.counters.since_best >= best.patience
        return waited or self.counters.step >= self.session.total_steps

    @contextmanager
    def open_logs(self) -> Iterator[None]:
        """The run's log files, open for the main process, and the trackers."""
        if self.observer is not None:
            self.observer.total(self.session.total_steps, self.counters.step)
        if not self.session.is_main:
            yield
            return
        folder = self.session.folder
        self._metrics = JsonLines(folder / "metrics.jsonl", keep_until=self._resumed_at)
        self._timing = JsonLines(folder / "timing.jsonl", keep_until=self._resumed_at)
        try:
            yield
        finally:
            self._metrics.close()
            self._timing.close()

    def after_step(self) -> bool:
        """Do what is due after a step, in every process; True to stop."""
        counters, recipe, world = self.counters, self.session.recipe, self.session.accelerator.num_processes
        train, run = recipe.train, recipe.run
        last = counters.step == self.session.total_steps
        logs = last or counters.batch == 0 or counters.step % run.log_every == 0
        evaluates = last or _due(counters, train.eval_every, train.eval_every_steps)
        samples = _due(counters, run.samples_every, run.samples_every_steps)
        if world == 1 or logs:  # processes need not be asked to stop at the same step
            self.stopped = agreed(self.session.accelerator, self.stop_asked)
            if self.stopped and self.observer is not None:
                self.observer.stopping()
        saves = last or self.stopped or _saves(counters, run)
        if logs:
            self._report()
        elif evaluates or samples or saves or counters.step % self.window.check_every == 0:
            self.window.check()  # nothing that is not finite is judged, shown or kept
        with self.window.paused():
            if evaluates:
                self._evaluate()
            if samples and self.session.makes_samples:
                self._sample()
            if saves or self.finished:
                self.save()
        return self.stopped or self.finished

    def _report(self) -> None:
        """Means since the last report, what the methods say, and the speed."""
        speed = self.window.steps_per_second()
        values = self.window.means()
        for name, method in self.session.named_methods.items():
            values |= {f"method/{name}/{key}": float(value) for key, value in method.scalars().items()}
        values["train/lr"] = self.session.learning_rate
        self._tell(values)
        data = self.session.recipe.data
        unit = getattr(data, "batch_unit", "samples")
        timing = {"steps_per_second": speed, f"{unit}_per_second": speed * data.batch}
        if torch.cuda.is_available():
            timing["peak_gpu_bytes"] = float(torch.cuda.max_memory_allocated())
        if self._timing is not None:
            self._timing.write({"step": self.counters.step, "time": time.time(), **timing})
        if self.observer is not None:
            self.observer.timing(self.counters, timing)

    def _tell(self, values: dict[str, float]) -> None:
        """One line of metrics, to the log, the trackers and whoever looks on."""
        counters = self.counters
        self.last_metrics |= finite(values)
        where = {name: getattr(counters, name) for name in PLACE}
        if self._metrics is not None:
            self._metrics.write({**where, **dict(sorted(values.items()))})  # one order, resumed or not
        self.session.accelerator.log(values, step=counters.step)
        if self.observer is not None:
            self.observer.metrics(counters, values)

    def _evaluate(self) -> None:
        """Evaluate, log, and keep the state if it is the best so far."""
        values = {f"eval/{name}": value for name, value in evaluate_model(self.session).items()}
        self._tell(values)
        counters, best = self.counters, self.session.recipe.run.best
        for name, value in values.items():
            check_number(name, value, counters.step)
        if best is None:
            return
        if best.metric not in values:
            raise RecipeError(
                f"run.best.metric {best.metric} is not evaluated", hint=f"one of {', '.join(sorted(values))}"
            )
        value, held = values[best.metric], counters.best
        if math.isfinite(value) and (held is None or (value > held if best.mode == "max" else value < held)):
            counters.best, counters.best_step, counters.since_best = value, counters.step, 0
            self.save(BEST)
        else:
            counters.since_best += 1

    def _sample(self) -> None:
        """Let the task show what the model makes; every process helps, the main one writes."""
        session = self.session
        target = session.folder / "samples" / f"step-{self.counters.step:06d}"
        generator = torch.Generator().manual_seed(session.recipe.train.seed)
        with own_place(session.accelerator, target) as place, atomic(place) as folder, session.for_judging() as model:
            folder.mkdir()
            session.task.samples(model, generator, folder)

    def save(self, name: str | None = None) -> None:
        """Write the state, and drop those that `run.keep` no longer wants.

        Raises:
            NumericsError: the state is not finite; nothing is written.
            OutputError: it cannot be written.
        """
        session, counters = self.session, self.counters
        average = session.average.values if session.average is not None else None
        snapshot = capture(
            session.model, session.optimizers, session.methods, average, base=session.base, keep=session.is_main
        )
        scaler = session.accelerator.scaler
        snapshot.state |= {
            "step": counters.step, "counters": asdict(counters), "window": self.window.state(),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }  # fmt: skip
        on_main(session.accelerator, lambda: self._write(snapshot, name))

    def _write(self, snapshot: Snapshot, name: str | None) -> None:
        run, step = self.session.folder, self.counters.step
        check_finite(self.session.model, snapshot, step)
        for log in (self._metrics, self._timing):
            if log is not None:
                log.sync()  # a checkpoint never outlives the lines that led to it
        save_state(run / "checkpoints" / name if name else step_folder(run, step), snapshot)
        kept = self.session.recipe.kept
        if kept != "all":
            for old in checkpoint_steps(run)[:-kept]:
                shutil.rmtree(step_folder(run, old))

    def restore(self, folder: Path) -> None:
        """Put a saved state back: methods' shapes, then weights, then the optimizers'."""
        session = self.session
        state, flat = read_state(folder), load_tensors(folder / "optimizer.safetensors")
        load_methods(session.methods, state["methods"], flat)
        load_model(session.model, load_tensors(folder / "model.safetensors"), session.base, state.get("base"))
        prepare_training(session)
        for phase, optimizer in session.optimizers.items():
            load_optimizer(optimizer, session.model, without_prefix(flat, f"{phase}/"), state["optimizers"][phase])
        if session.average is not None:
            session.average.values = held_as_parameters(session.model, load_tensors(folder / "ema.safetensors"))
        if state["scaler"] is not None and session.accelerator.scaler is not None:
            session.accelerator.scaler.load_state_dict(state["scaler"])
        self.counters = Counters(**state["counters"])
        self.window.load_state(state["window"])
        self._resumed_at = self.counters.step
        log = session.folder / "metrics.jsonl"
        for line in read_lines(log) if session.is_main and log.is_file() else ():
            if line["step"] <= self.counters.step:  # what a run that is finished already ends with
                self.last_metrics |= {name: value for name, value in line.items() if name not in PLACE}


def _due(counters: Counters, epochs: int | None, steps: int | None) -> bool:
    """Whether something is due that happens every so many steps, or where none are given every so many epochs."""
    if steps is not None:
        return counters.step % steps == 0
    return epochs is not None and counters.batch == 0 and counters.epoch % epochs == 0


def _saves(counters: Counters, run: Any) -> bool:
    return _due(counters, None, run.save_every_steps) or _due(counters, run.save_every, None)


def evaluate_model(session: Session) -> dict[str, float]:
    """The task's metrics on its evaluation split, with averaged weights where there are any."""
    accelerator, data, limit = session.accelerator, session.recipe.data, session.recipe.train.limit_batches
    batches = session.task.batches(
        "eval", 0, batch=data.eval_batch or data.batch, rank=accelerator.process_index, world=accelerator.num_processes,
        workers=data.workers,
    )  # fmt: skip
    with session.for_judging() as model:
        found = session.task.evaluate(
            model,
            map(session.on_device, islice(batches, limit)),
            reduce=lambda tensor: accelerator.reduce(tensor, "sum"),
        )
    return {name: float(value) for name, value in found.items()}
