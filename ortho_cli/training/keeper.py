"""What happens around the steps of a run: logs, evaluation, the best state, saving, pruning, putting a state back."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import torch

from .ema import Average
from .log import JsonLines
from .loop import Counters, Hooks, Window
from .session import Session, prepare_training
from .state import (
    checkpoint_steps,
    flatten_optimizer,
    last_checkpoint,
    load_tensors,
    read_state,
    restore_optimizer,
    save_state,
    step_folder,
)

__all__ = ["Keeper", "evaluate_model"]


class Keeper:
    """Saves, prunes, evaluates and remembers the best; the hooks of the loop."""

    def __init__(self, session: Session, observer: Any) -> None:
        self.session, self.observer = session, observer
        self.run = session.recipe.run
        self.counters = Counters()
        self.last_metrics: dict[str, float] = {}
        self.stop_asked = False
        self.window = Window(session)
        decay = session.recipe.train.ema
        self.ema = Average(decay) if decay is not None else None
        self._metrics: JsonLines | None = None
        self._timing: JsonLines | None = None
        self._resumed_at: int | None = None

    def hooks(self) -> Hooks:
        return Hooks(self._on_metrics, self._on_timing, self._on_step_end, self.ema)

    @contextmanager
    def open_logs(self) -> Iterator[None]:
        """The run's log files, open for the main process."""
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

    def _on_metrics(self, counters: Counters, values: dict[str, float]) -> None:
        self.last_metrics |= values
        where = {"step": counters.step, "epoch": counters.epoch, "samples": counters.samples}
        line = {**where, **dict(sorted(values.items()))}  # one order, resumed or not
        if self._metrics is not None:
            self._metrics.write(line)
        if self.observer is not None:
            self.observer.metrics(counters, values)

    def _on_timing(self, counters: Counters, values: dict[str, float]) -> None:
        if torch.cuda.is_available():
            values = {**values, "peak_gpu_bytes": float(torch.cuda.max_memory_allocated())}
        if self._timing is not None:
            self._timing.write({"step": counters.step, "time": time.time(), **values})
        if self.observer is not None:
            self.observer.timing(counters, values)

    def _on_step_end(self, counters: Counters, epoch_ended: bool) -> bool:
        train, last = self.session.recipe.train, counters.step == self.session.total_steps
        by_step = train.eval_every_steps is not None and counters.step % train.eval_every_steps == 0
        by_epoch = train.eval_every_steps is None and epoch_ended and counters.epoch % train.eval_every == 0
        stop = False
        if by_step or by_epoch or last:
            stop = self._evaluate(counters)
        due = self.run.save_every_steps is not None and counters.step % self.run.save_every_steps == 0
        due |= self.run.save_every is not None and epoch_ended and counters.epoch % self.run.save_every == 0
        if due or last or stop or self.stop_asked:
            self.save(counters)
        return stop or self.stop_asked

    def _evaluate(self, counters: Counters) -> bool:
        """Evaluate, log, keep the best; True when patience is over."""
        values = {f"eval/{name}": value for name, value in evaluate_model(self.session, self.ema).items()}
        self._on_metrics(counters, values)
        best = self.run.best
        if best is None:
            return False
        value = values[best.metric]
        better = counters.best is None or (value > counters.best if best.mode == "max" else value < counters.best)
        if better:
            counters.best, counters.best_step, counters.since_best = value, counters.step, 0
            self.save(counters, name="best")
        else:
            counters.since_best += 1
        return best.patience is not None and counters.since_best >= best.patience

    def save(self, counters: Counters, name: str | None = None) -> None:
        """Write the state (main process) and drop what `run.keep` no longer wants."""
        accelerator = self.session.accelerator
        accelerator.wait_for_everyone()
        if self.session.is_main:
            run = self.session.folder
            folder = run / "checkpoints" / name if name else step_folder(run, counters.step)
            moments: dict[str, torch.Tensor] = {}
            numbers: dict[str, Any] = {}
            for phase, optimizer in self.session.optimizers.items():
                found, listed = flatten_optimizer(optimizer, self.session.model)
                moments |= {f"{phase}/{key}": value for key, value in found.items()}
                numbers[phase] = listed
            method_tensors = {}
            method_states = {}
            for index, method in enumerate(self.session.methods):
                state = dict(method.state())
                for key, tensor in state.pop("tensors", {}).items():
                    method_tensors[f"method/{index}/{key}"] = tensor
                method_states[str(index)] = {"name": method.name, "state": state}
            scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
            state = {
                "counters": asdict(counters), "optimizers": numbers, "methods": method_states, "scaler": scaler,
                "step": counters.step, "window": self.window.state(),
            }  # fmt: skip
            ema = self.ema.values if self.ema is not None else None
            save_state(folder, self.session.model.state_dict(), {**moments, **method_tensors}, state, ema)
            self._prune()
        accelerator.wait_for_everyone()

    def _prune(self) -> None:
        if self.run.keep == "all":
            return
        for step in checkpoint_steps(self.session.folder)[: -self.run.keep]:
            shutil.rmtree(step_folder(self.session.folder, step))

    def restore(self) -> None:
        """Put the last complete state back: methods' shapes, then weights, then optimizers."""
        session = self.session
        folder = last_checkpoint(session.folder)
        assert folder is not None
        state = read_state(folder)
        flat = load_tensors(folder / "optimizer.safetensors")
        for index, method in enumerate(session.methods):
            prefix = f"method/{index}/"
            tensors = {key.removeprefix(prefix): value for key, value in flat.items() if key.startswith(prefix)}
            method.load_state({**state["methods"][str(index)]["state"], "tensors": tensors})
        session.model.load_state_dict(load_tensors(folder / "model.safetensors"), strict=True)
        prepare_training(session)
        for phase, optimizer in session.optimizers.items():
            prefix = f"{phase}/"
            tensors = {key.removeprefix(prefix): value for key, value in flat.items() if key.startswith(prefix)}
            restore_optimizer(optimizer, session.model, tensors, state["optimizers"][phase])
        if self.ema is not None:
            self.ema.values = load_tensors(folder / "ema.safetensors")
        if state["scaler"] is not None and session.accelerator.scaler is not None:
            session.accelerator.scaler.load_state_dict(state["scaler"])
        self.counters = Counters(**state["counters"])
        self.window.load_state(state["window"])
        self._resumed_at = self.counters.step


def evaluate_model(session: Session, ema: Average | None = None) -> dict[str, float]:
    """The task's metrics on its evaluation split, with averaged weights where there are any."""
    accelerator, data = session.accelerator, session.recipe.data
    model = session.wrapped if session.wrapped is not None else session.model
    batches = session.task.batches(
        "eval", 0, batch=data.eval_batch or data.batch, rank=accelerator.process_index, world=accelerator.num_processes,
        workers=data.workers,
    )  # fmt: skip
    limit = session.recipe.train.limit_batches
    swapped = ema.swapped(session.model) if ema is not None else nullcontext()
    with swapped, torch.no_grad(), accelerator.autocast():
        model.eval()
        found = session.task.evaluate(
            model,
            (_to(batch, accelerator.device) for index, batch in enumerate(batches) if limit is None or index < limit),
            reduce=lambda tensor: accelerator.reduce(tensor, "sum"),
        )
    return {name: float(value) for name, value in found.items()}


def _to(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in batch.items()}
