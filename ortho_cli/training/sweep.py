"""Search a recipe's keys for the best evaluation: every trial a run in a folder of its own, on Optuna.

Evaluations on the way decide, by the median of the others, whether a trial goes on. The study lies in a database, by
default a file in the sweep's folder: the same command goes on where it stopped, and several machines that share a
database share the trials.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ortho_cli.errors import NumericsError, RecipeError, TargetError, UsageError, check_choice
from ortho_cli.recipe.train import TrainRecipe, load_train

from .log import read_lines
from .processes import leave
from .run import Interrupted, Outcome, train
from .run_folder import RECIPE, best_or_last
from .sweep_report import write_report
from .sweep_space import Param, check_space, parse_params, trial_recipe
from .sweep_study import (
    DIRECTIONS,
    FOLDER,
    REASON,
    SAMPLERS,
    TrialRecord,
    forget,
    need_optuna,
    open_study,
    queue_again,
    records,
)

if TYPE_CHECKING:
    import optuna

__all__ = ["Sweep", "plan_sweep", "run_sweep"]

FINISHED = ("complete", "pruned", "failed")
# So many trials that fail before any is complete are no bad luck: the reason of the last one is told.
FAILURES = 3


@dataclass(frozen=True)
class Sweep:
    """A sweep as asked for: the recipe, what varies, and what is judged."""

    recipe: TrainRecipe
    params: tuple[Param, ...]
    metric: str
    direction: str
    trials: int
    sampler: str
    storage: str | None

    @property
    def folder(self) -> Path:
        """Where trials, report and best recipe go."""
        return Path(self.recipe.run.dir)


def plan_sweep(
    source: str,
    params: Sequence[str],
    sets: Sequence[str] = (),
    *,
    metric: str = "eval/accuracy",
    direction: str = "maximize",
    trials: int = 20,
    sampler: str = "tpe",
    storage: str | None = None,
) -> Sweep:
    """Read and check everything that a sweep is told, but start nothing.

    Args:
        source: a recipe file, or a shipped recipe's name.
        params: `KEY=VALUES` texts, see `sweep_space`.
        sets: changes of the recipe, `KEY=VALUE` each.
        metric: of the evaluations, as `metrics.jsonl` names it; the last one counts, or the best where the recipe's
            `run.best` watches this metric.
        direction: "maximize" or "minimize".
        trials: how many in all, those of earlier calls included; of machines at work on the last one each ends its own.
        sampler: "tpe", "nsgaii" (evolutionary) or "random".
        storage: a database URL; None: a file in the recipe's folder.

    Raises:
        UsageError: something that contradicts itself.
        RecipeError: the recipe, a key or a value.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "a sweep runs its trials in one process each",
            hint="start several sweeps with one --storage; of one trial on many GPUs: accelerate launch ... train",
        )
    if trials < 1:
        raise UsageError(f"--trials {trials}: run one at least")
    check_choice("--sampler", sampler, SAMPLERS)
    check_choice("--direction", direction, DIRECTIONS)
    if not metric.startswith("eval/"):
        raise UsageError(f"--metric {metric} is no evaluation", hint="e.g. eval/accuracy, eval/loss")
    recipe, found = load_train(source, sets), parse_params(params)
    if recipe.matrix is not None:
        raise UsageError("the recipe has a matrix, which a sweep takes the place of", hint="--set matrix=null")
    check_space(recipe, found)
    return Sweep(recipe, found, metric, direction, trials, sampler, storage)


def run_sweep(
    sweep: Sweep, *, observe: Callable[[str], AbstractContextManager[Any]] = lambda title: nullcontext()
) -> tuple[list[TrialRecord], list[Path]]:
    """Run the trials that are missing, and write the report.

    Args:
        sweep: of `plan_sweep`.
        observe: makes what looks on a run, from its title.

    Returns:
        All trials, and the files of the report; `best.yaml` is the recipe of the best.

    Raises:
        Interrupted: by a signal; the trial's state is saved, the same command goes on.
        UsageError: Optuna is missing.
        NumericsError: no trial was complete.
        OrthoError: as `run.train`, and what `open_study` raises.
    """
    need_optuna()
    study = open_study(sweep.recipe, sweep.params, sweep.metric, sweep.direction, sweep.sampler, sweep.storage)
    objective = _Objective(sweep, observe)
    try:
        while _count(study, *FINISHED) < sweep.trials:
            study.optimize(objective, n_trials=1)
            failed = [record for record in records(study) if record.state == "failed"]
            if len(failed) >= FAILURES and not _count(study, "complete"):
                raise NumericsError(f"{len(failed)} trials failed and none was complete; the last: {failed[-1].reason}")
    except (Interrupted, KeyboardInterrupt) as stop:
        if not objective.begun:
            raise
        queue_again(study, study.get_trials(deepcopy=False)[objective.begun[-1]])
        raise Interrupted(
            f"stopped after {_count(study, *FINISHED)} of {sweep.trials} trials; the one under way has saved its state",
            hint="go on with the same command",
        ) from stop
    except UsageError:  # what was asked for cannot be judged, or this machine lacks a library
        if not any(_keeps(record, sweep, objective.begun) for record in records(study)):
            forget(study, sweep.folder)
        elif objective.begun:
            queue_again(study, study.get_trials(deepcopy=False)[objective.begun[-1]])
        raise
    finally:
        leave()
    found = records(study)
    if not _count(study, "complete"):
        raise NumericsError(f"none of {len(found)} trials was complete; the last: {found[-1].reason or 'pruned'}")
    return found, write_report(sweep, study, found)


def _count(study: optuna.Study, *states: str) -> int:
    return sum(record.state in states for record in records(study))


def _keeps(record: TrialRecord, sweep: Sweep, begun: Sequence[int]) -> bool:
    """Whether a trial is worth its study: another call's, or finished, or with a state to go on from."""
    folder = sweep.folder / record.folder
    return record.number not in begun or record.state in FINISHED or best_or_last(folder) is not None


class _Objective:
    """What Optuna calls for each trial; `begun` are those that it was called for, the last one at the end."""

    def __init__(self, sweep: Sweep, observe: Callable[[str], AbstractContextManager[Any]]) -> None:
        self.sweep, self.observe = sweep, observe
        self.begun: list[int] = []

    def __call__(self, trial: optuna.Trial) -> float:
        """One trial: its value; pruned where the others are better, failed where these values do not train."""
        import optuna

        sweep = self.sweep
        self.begun.append(trial.number)
        name = str(trial.user_attrs.get(FOLDER, f"trial-{trial.number:04d}"))
        folder = sweep.folder / name
        resumes = FOLDER in trial.user_attrs and (folder / RECIPE).is_file()
        values = {param.key: param.suggest(trial) for param in sweep.params}
        trial.set_user_attr(FOLDER, name)
        try:
            recipe = trial_recipe(sweep.recipe, values, folder)
            with self.observe(name) as view:
                watch = _Watch(view, trial, sweep.metric)
                if resumes:
                    watch.repeat(folder)
                outcome = train(recipe, resume=resumes, force=not resumes, observer=watch, name=name)
            return _value(outcome, recipe, sweep.metric)
        except (NumericsError, TargetError, RecipeError) as error:
            trial.set_user_attr(REASON, error.message)
            raise optuna.TrialPruned(error.message) from error


class _Watch:
    """Looks on a run for its trial: reports evaluations, and ends the run where they are worse than others'."""

    def __init__(self, view: Any, trial: optuna.Trial, metric: str) -> None:
        self._view, self._trial, self._metric = view, trial, metric
        self._reported: set[int] = set()

    def repeat(self, folder: Path) -> None:
        """Report what an earlier call evaluated in this folder; it may have died before it wrote a line."""
        path = folder / "metrics.jsonl"
        for line in read_lines(path) if path.is_file() else ():
            if line.get(self._metric) is not None:
                self._report(line["step"], line[self._metric])

    def total(self, steps: int, done: int) -> None:
        """The number of steps, and how many an earlier run did."""
        if self._view is not None:
            self._view.total(steps, done)

    def metrics(self, counters: Any, values: dict[str, float]) -> None:
        """New numbers.

        Raises:
            TrialPruned: the run is not worth going on with.
            UsageError: the metric is none of the evaluations.
        """
        import optuna

        if self._view is not None:
            self._view.metrics(counters, values)
        judged = sorted(name for name in values if name.startswith("eval/"))
        if not judged:
            return
        if self._metric not in values:
            raise UsageError(f"--metric {self._metric} is not evaluated", hint=f"one of {', '.join(judged)}")
        if self._report(counters.step, values[self._metric]) and self._trial.should_prune():
            raise optuna.TrialPruned(f"pruned at step {counters.step}")

    def timing(self, counters: Any, values: dict[str, float]) -> None:
        """The speed."""
        if self._view is not None:
            self._view.timing(counters, values)

    def stopping(self) -> None:
        """A signal asked to stop."""
        if self._view is not None:
            self._view.stopping()

    def _report(self, step: int, value: float) -> bool:
        """Tell the study, once for each step (a resumed run repeats some); whether it had not heard of it."""
        if step in self._reported or not isfinite(value):
            return False
        self._reported.add(step)
        self._trial.report(value, step)
        return True


def _value(outcome: Outcome, recipe: TrainRecipe, metric: str) -> float:
    """The best evaluation where the run kept the best by this metric, else the last.

    Raises:
        UsageError: there was none.
        NumericsError: it is not finite.
    """
    best = recipe.run.best
    found = outcome.best if best is not None and best.metric == metric else outcome.metrics.get(metric)
    if found is None and metric in outcome.metrics:
        raise NumericsError(f"{metric} is not finite at step {outcome.step}")
    if found is None:
        known = sorted(name for name in outcome.metrics if name.startswith("eval/"))
        raise UsageError(f"--metric {metric} is not evaluated", hint=f"one of {', '.join(known)}" if known else None)
    return found
