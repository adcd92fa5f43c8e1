"""A run from recipe to report: the folder, saving and resuming, evaluation, the best checkpoint, the clean stop.

`train` is what `ortho train` calls; the arithmetic is in `loop.py`, the parts in `session.py`, what happens between
steps in `keeper.py`.
"""

from __future__ import annotations

import shlex
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from ortho_cli.analysis.run_report import write_run_report
from ortho_cli.errors import NumericsError, OrthoError

from .debug_run import overfit_verdict, profiled
from .export import check_exports, export
from .keeper import Keeper
from .loop import fit
from .processes import on_main, open_accelerator
from .run_folder import OUTCOME, begin, best_or_last, check_folder, write_json
from .session import Session, open_session, prepare_training
from .state import last_checkpoint
from .trackers import tracked

__all__ = ["Interrupted", "Outcome", "train"]


class Interrupted(OrthoError):
    """The run was asked to stop; its state is saved."""

    exit_code = 130


@dataclass
class Outcome:
    """What a run ended with: a run's `outcome.json`."""

    name: str
    folder: str
    step: int
    metrics: dict[str, float | None]
    parameters: int
    trainable: int
    seconds: float
    best: float | None = None
    best_step: int | None = None
    exports: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def train(
    recipe: Any, *, resume: bool = False, force: bool = False, observer: Any = None, name: str = "", debug: str = ""
) -> Outcome:
    """Carry out a training recipe.

    Args:
        recipe: a resolved `TrainRecipe`.
        resume: go on from the last complete checkpoint of the run's folder.
        force: begin anew in a folder that exists; what the earlier run left there is removed.
        observer: looks on, as `Keeper` calls it; e.g. the live view.
        name: of the cell, in a matrix.
        debug: `overfit` repeats the first epoch's batches, `profile` leaves a trace in the folder.

    Returns:
        The outcome; the run's folder holds recipe, metrics, checkpoints and exports.

    Raises:
        OutputError: the folder exists and neither `resume` nor `force` was given.
        NumericsError: the loss became non-finite; the last good checkpoint is named.
        Interrupted: SIGINT or SIGTERM; the state is saved.
    """
    started = time.perf_counter()
    folder = Path(recipe.run.dir)
    accelerator = open_accelerator(recipe)
    on_main(accelerator, lambda: check_folder(folder, recipe, resume=resume, force=force))
    session = open_session(recipe, accelerator, kept=folder if resume else None)
    session.repeats_first_epoch = debug == "overfit"
    keeper = Keeper(session, observer)
    saved = last_checkpoint(folder) if resume else None
    if saved is not None:
        keeper.restore(saved)
    else:
        prepare_training(session)
        session.notes += ["no checkpoint was saved yet: began at step 0"] if resume else []
    check_exports(session)
    continued = [index for index, method in enumerate(session.methods) if method.continues]
    on_main(accelerator, lambda: begin(folder, recipe, anew=saved is None, continued=continued))
    on_main(accelerator, lambda: session.task.keep(folder))
    profile = profiled(session, keeper.after_step) if debug == "profile" else nullcontext(keeper.after_step)
    with tracked(session), keeper.open_logs(), _stop_signals(keeper), profile as after_step:
        try:
            if not keeper.finished:
                fit(session, keeper.counters, keeper.window, after_step)
        except NumericsError as error:
            raise _with_advice(error, session, folder) from error
    if keeper.stopped and not keeper.finished:
        raise Interrupted(
            f"stopped at step {keeper.counters.step} of {session.total_steps}; the state is saved",
            hint=f"go on with: ortho train {shlex.quote(str(folder / 'recipe.yaml'))} --resume",
        )
    exports = export(session, folder)
    session.notes += [f"{key}: {note}" for key, each in session.named_methods.items() for note in each.closing_notes()]
    if debug == "overfit":
        session.notes.append(overfit_verdict(folder))
    counters, parameters = keeper.counters, list(session.model.parameters())
    outcome = Outcome(
        name, str(folder), counters.step, keeper.last_metrics, sum(each.numel() for each in parameters),
        sum(each.numel() for each in parameters if each.requires_grad), time.perf_counter() - started, counters.best,
        counters.best_step, exports, session.notes,
    )  # fmt: skip
    on_main(accelerator, lambda: write_json(folder / OUTCOME, asdict(outcome)))
    on_main(accelerator, lambda: write_run_report(folder))
    return outcome


def _with_advice(error: NumericsError, session: Session, folder: Path) -> NumericsError:
    good = last_checkpoint(folder) or best_or_last(folder)
    kept = f"last good checkpoint: {good}" if good else "no checkpoint was saved before it"
    return NumericsError(
        f"{error.message} (learning rate {session.learning_rate:.3g}); {kept}",
        hint=error.hint or "lower optimizer.lr, add schedule.warmup or train.clip",
    )


@contextmanager
def _stop_signals(keeper: Keeper) -> Iterator[None]:
    """SIGINT and SIGTERM ask the loop to save and stop; a second one ends at once."""

    def ask(number: int, frame: FrameType | None) -> None:
        if keeper.stop_asked:
            raise KeyboardInterrupt
        keeper.stop_asked = True  # and no more: anything may be half done here, even the import of a library

    if threading.current_thread() is not threading.main_thread():  # only there may signals be handled
        yield
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
