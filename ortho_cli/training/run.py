"""A run from recipe to report: the folder, saving and resuming, evaluation, the best checkpoint, the clean stop.

`train` is what `ortho train` calls; the arithmetic is in `loop.py`, the parts in `session.py`.
"""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from ortho_cli.checkpoints.output import existing_parent
from ortho_cli.errors import NumericsError, OrthoError, OutputError
from ortho_cli.recipe.train import difference, load_train, may_change, resolved_yaml

from .keeper import Keeper, evaluate_model
from .loop import fit
from .session import Session, open_session, prepare_training
from .state import last_checkpoint

__all__ = ["Interrupted", "Outcome", "evaluate_model", "train"]


class Interrupted(OrthoError):
    """The run was asked to stop; its state is saved."""

    exit_code = 130


@dataclass
class Outcome:
    """What a run ended with."""

    folder: Path
    step: int
    metrics: dict[str, float]
    parameters: int
    trainable: int
    seconds: float
    best: float | None = None
    exports: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def train(recipe: Any, *, resume: bool = False, force: bool = False, observer: Any = None) -> Outcome:
    """Carry out a training recipe.

    Args:
        recipe: a resolved `TrainRecipe`.
        resume: go on from the last complete checkpoint of the run's folder.
        force: begin anew in a folder that exists; what the earlier run left there is removed.
        observer: gets `metrics(counters, values)` and `timing(counters, values)`, e.g. the live view.

    Returns:
        The outcome; the run's folder holds recipe, metrics, checkpoints and exports.

    Raises:
        OutputError: the folder exists and neither `resume` nor `force` was given.
        NumericsError: the loss became non-finite; the last good checkpoint is named.
        Interrupted: SIGINT or SIGTERM; the state is saved.
    """
    started = time.perf_counter()
    folder = Path(recipe.run.dir)
    _claim(folder, recipe, resume=resume, force=force)
    session = open_session(recipe)
    keeper = Keeper(session, observer)
    if resume:
        keeper.restore()
    else:
        prepare_training(session)
    if session.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(resolved_yaml(recipe), "utf-8")
    session.accelerator.wait_for_everyone()
    with keeper.open_logs(), _stop_signals(keeper):
        try:
            if keeper.counters.step < session.total_steps:
                fit(session, keeper.counters, keeper.hooks(), keeper.window)
        except NumericsError as error:
            last = last_checkpoint(folder)
            kept = f"last good checkpoint: {last}" if last else "no checkpoint was saved before it"
            raise NumericsError(f"{error.message}; {kept}", hint=error.hint, where=str(folder)) from error
    if keeper.stop_asked and keeper.counters.step < session.total_steps:
        raise Interrupted(
            f"stopped at step {keeper.counters.step} of {session.total_steps}; the state is saved",
            hint="go on with: ortho train RECIPE --resume",
        )
    exports = _export(session, folder)
    total = sum(parameter.numel() for parameter in session.model.parameters())
    trainable = sum(parameter.numel() for parameter in session.model.parameters() if parameter.requires_grad)
    seconds = time.perf_counter() - started
    return Outcome(
        folder, keeper.counters.step, keeper.last_metrics, total, trainable, seconds, keeper.counters.best, exports,
        session.notes,
    )  # fmt: skip


def _claim(folder: Path, recipe: Any, *, resume: bool, force: bool) -> None:
    """Refuse a folder that holds something, unless told what to do with it."""
    existing_parent(folder)
    if resume:
        if last_checkpoint(folder) is None:
            raise OutputError(f"{folder} holds no complete checkpoint to resume", hint="start it without --resume")
        everything = difference(load_train(str(folder / "recipe.yaml")), recipe)
        changed = [change for change in everything if not may_change(*change)]
        if changed:
            listed = "; ".join(f"{key}: was {old}, now {new}" for key, old, new in changed)
            raise OutputError(
                f"the recipe changed since {folder} was started: {listed}",
                hint="resume with the same recipe, or start another run with --set run.dir=OTHER",
            )
        return
    if folder.exists() and any(folder.iterdir()):
        if not force:
            raise OutputError(
                f"run folder exists: {folder}",
                hint="go on with --resume, begin anew with --force, or --set run.dir=OTHER",
            )
        for name in ("checkpoints", "metrics.jsonl", "timing.jsonl", "recipe.yaml", "report.html", "export"):
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextmanager
def _stop_signals(keeper: Keeper) -> Iterator[None]:
    """SIGINT and SIGTERM ask the loop to save and stop; a second one ends at once."""

    def ask(number: int, frame: FrameType | None) -> None:
        if keeper.stop_asked:
            raise KeyboardInterrupt
        keeper.stop_asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _export(session: Session, folder: Path) -> list[str]:
    """What the methods leave behind, each in its own folder below `export/`."""
    if not session.is_main:
        return []
    written = []
    for method in session.methods:
        target = folder / "export" / method.name
        if target.exists():
            shutil.rmtree(target)
        method.export(session.model, target)
        if target.exists():
            written.append(str(target))
    return written
