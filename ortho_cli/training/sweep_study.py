"""The study behind a sweep: where Optuna keeps its trials, and how one that was cut short is taken up again.

A trial that a signal stopped has saved its state: its values are queued anew with the folder to go on in. One whose
process died without a word is found by its missing heartbeat, on whatever machine asks next, and queued likewise.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ortho_cli.errors import OutputError, UsageError
from ortho_cli.recipe.train import MAY_CHANGE, TrainRecipe, recipe_data

from .sweep_space import Param

if TYPE_CHECKING:
    import optuna

__all__ = [
    "DIRECTIONS", "FILE", "FOLDER", "REASON", "SAMPLERS", "TrialRecord", "forget", "need_optuna", "open_study",
    "queue_again", "records", "shown_storage",
]  # fmt: skip

SAMPLERS = ("tpe", "nsgaii", "random")
DIRECTIONS = ("maximize", "minimize")
FILE = "study.db"  # the default storage, in the sweep's folder
HEARTBEAT, GRACE = 60, 180  # seconds between signs of life, and without one until a trial counts as dead
BUSY = 60  # seconds that a process waits for a database that another one writes to
FOLDER, REASON, SWEEP = "folder", "reason", "sweep"  # what is noted of trials, and of the study


@dataclass(frozen=True)
class TrialRecord:
    """One trial, as tables have it; `state` is complete, pruned, failed, interrupted, running or waiting."""

    number: int
    state: str
    value: float | None
    params: dict[str, Any]
    folder: str
    seconds: float | None
    reason: str = ""
    evaluations: dict[int, float] = field(default_factory=dict)


def need_optuna() -> None:
    """Refuse to begin without the library.

    Raises:
        UsageError: with the command that installs it.
    """
    try:
        import optuna
    except ImportError as error:
        raise UsageError("a sweep needs Optuna", hint="pip install 'ortho-cli[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # what fails or stops is told once, by us


def open_study(
    recipe: TrainRecipe, params: Sequence[Param], metric: str, direction: str, sampler: str, storage: str | None
) -> optuna.Study:
    """Begin a study, or go on with the one of that name in the storage.

    Args:
        recipe: what is varied; the study is named as its folder.
        params: what varies.
        metric: what is judged.
        direction: "maximize" or "minimize".
        sampler: one of `SAMPLERS`.
        storage: a database URL; None: a file in the recipe's folder.

    Raises:
        UsageError: a storage that cannot be reached.
        OutputError: the storage holds another sweep under this name, or the folder something else.
    """
    import optuna
    import sqlalchemy.exc

    folder = Path(recipe.run.dir)
    url = storage or f"sqlite:///{folder / FILE}"
    began = (folder / FILE).exists() if storage is None else folder.exists()
    if not began and folder.exists() and any(folder.iterdir()):
        raise OutputError(f"folder exists and holds no sweep: {folder}", hint="--set run.dir=OTHER")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            kept = optuna.storages.RDBStorage(
                url, engine_kwargs={"connect_args": {"timeout": BUSY}} if url.startswith("sqlite") else None,
                heartbeat_interval=HEARTBEAT, grace_period=GRACE, heartbeat_stale_trial_callback=queue_again,
            )  # fmt: skip
        study = optuna.create_study(
            study_name=folder.name, storage=kept, pruner=optuna.pruners.MedianPruner(),
            load_if_exists=True, direction="maximize" if direction == "maximize" else "minimize",
        )  # fmt: skip
    except (ImportError, ValueError, sqlalchemy.exc.SQLAlchemyError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"--storage {shown_storage(url)} cannot be used: {reason}",
            hint="e.g. --storage sqlite:///study.db, or postgresql://USER@HOST/DB with its driver installed",
        ) from error
    if not study.get_trials(deepcopy=False) and any(folder.glob("trial-*")):
        raise OutputError(
            f"{folder} holds trials that the storage does not know of", hint="--set run.dir=OTHER, or their --storage"
        )
    _same(study, recipe, params, metric, direction)
    study.sampler = _sampler(sampler, recipe.train.seed + len(study.get_trials(deepcopy=False)))
    return study


def _sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    """A sampler; its seed moves with the trials that are there, or a sweep that goes on would draw the same again."""
    import optuna

    if name == "nsgaii":
        return optuna.samplers.NSGAIISampler(seed=seed)
    return optuna.samplers.RandomSampler(seed=seed) if name == "random" else optuna.samplers.TPESampler(seed=seed)


def _same(study: optuna.Study, recipe: TrainRecipe, params: Sequence[Param], metric: str, direction: str) -> None:
    """Note what the study is about, or refuse to mix two."""
    about: dict[str, object] = {
        "metric": metric,
        "direction": direction,
        **{f"--param {x.key}": x.text for x in params},
    }
    about |= {key: value for key, value in _flat("", recipe_data(recipe)) if key not in MAY_CHANGE}
    known = study.user_attrs.get(SWEEP)
    if known is None and not study.get_trials(deepcopy=False):
        study.set_user_attr(SWEEP, about)
    elif known != about:
        old = known or {}
        changed = [key for key in {**old, **about} if old.get(key) != about.get(key)][:3]
        told = "; ".join(f"{key}: was {old.get(key)}, now {about.get(key)}" for key in changed)
        raise OutputError(
            f"the storage holds another sweep named {study.study_name}: {told}",
            hint="go on with the same command, or begin another with --set run.dir=OTHER",
        )


def _flat(prefix: str, value: object) -> list[tuple[str, object]]:
    if isinstance(value, dict):
        return [pair for key, item in value.items() for pair in _flat(f"{prefix}.{key}" if prefix else key, item)]
    return [(prefix, value)]


def queue_again(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    """Let the values of a trial that was cut short be tried again, in the folder where it stopped."""
    if FOLDER in trial.user_attrs and REASON not in trial.user_attrs:
        study.enqueue_trial(trial.params, user_attrs={FOLDER: trial.user_attrs[FOLDER]})


def forget(study: optuna.Study, folder: Path) -> None:
    """Take a study out of its storage, and the folders of its trials with it."""
    import optuna

    names = {record.folder for record in records(study)} - {""}
    optuna.delete_study(study_name=study.study_name, storage=study._storage)
    for name in names:
        shutil.rmtree(folder / name, ignore_errors=True)


def records(study: optuna.Study) -> list[TrialRecord]:
    """All trials that began, in order."""
    from optuna.trial import TrialState

    names = {TrialState.FAIL: "interrupted", TrialState.WAITING: "waiting", TrialState.RUNNING: "running"}
    found = []
    for trial in study.get_trials(deepcopy=False):
        reason = str(trial.user_attrs.get(REASON, ""))
        state = "failed" if reason else names.get(trial.state, trial.state.name.lower())
        params = trial.params or trial.system_attrs.get("fixed_params", {})
        found.append(
            TrialRecord(
                trial.number, state, trial.value if trial.state == TrialState.COMPLETE else None, dict(params),
                str(trial.user_attrs.get(FOLDER, "")), trial.duration.total_seconds() if trial.duration else None,
                reason, dict(trial.intermediate_values),
            )
        )  # fmt: skip
    return found


def shown_storage(url: str) -> str:
    """A storage's URL without its password."""
    try:
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError
    except ImportError:  # a dry run needs neither it nor Optuna
        return f"{url.partition(':')[0]}://..."
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return "(no URL)"
