"""The report of a sweep: how it went, what mattered, all trials, and the best recipe as `best.yaml`."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ortho_cli.analysis.figure import Bars, Curves, Figure, Line
from ortho_cli.analysis.report import Code, Fact, Report
from ortho_cli.analysis.table import Table
from ortho_cli.recipe.train import resolved_yaml

from .sweep_space import Param, trial_recipe
from .sweep_study import TrialRecord

if TYPE_CHECKING:
    import optuna

    from .sweep import Sweep

__all__ = ["best_trial", "sweep_data", "trial_table", "write_report"]

FORMATS = ("html", "png", "csv", "json")
CURVES = 7  # trials whose evaluations are drawn
PARTS = 5  # of a range, in the picture of one key
LEAST_TO_WEIGH = 4  # complete trials; fewer say nothing of what mattered


def write_report(sweep: Sweep, study: optuna.Study, trials: Sequence[TrialRecord]) -> list[Path]:
    """Write `report.html`, `figures/`, `trials.csv`, `report.json` and `best.yaml` into the sweep's folder.

    Args:
        sweep: what was asked for.
        study: where the trials lie.
        trials: of `sweep_study.records`, at least one complete.
    """
    best = best_trial(sweep, trials)
    recipe = trial_recipe(sweep.recipe, chosen(sweep.params, best), sweep.folder / "best")
    facts = (
        Fact(f"{best.value:.4g}", f"is the best {sweep.metric}, in {best.folder}"),
        Fact(str(len(trials)), "trials"),
        Fact(str(sum(trial.state == "pruned" for trial in trials)), "of them pruned"),
    )
    report = Report("Sweep", f"{sweep.folder.name}: {sweep.direction} {sweep.metric}", facts)
    report.section("Progress", _progress(sweep, trials))
    report.section("What matters", [*_importance(sweep, study), *_slices(sweep, trials)])
    report.section("Trials", [trial_table(sweep.params, trials, sweep.metric)])
    text = resolved_yaml(recipe)
    again = f"ortho train {shlex.quote(f'{sweep.folder.name}/best.yaml')}"
    report.section("The best recipe", [Code(again), Code(text, "best.yaml")])
    report.data, report.texts = sweep_data(sweep, trials), {"best.yaml": text}
    return report.write(sweep.folder, FORMATS)


def best_trial(sweep: Sweep, trials: Sequence[TrialRecord]) -> TrialRecord:
    """The complete trial with the best value; of several the first."""
    sign = -1 if sweep.direction == "maximize" else 1
    return min((trial for trial in trials if trial.value is not None), key=lambda trial: sign * (trial.value or 0.0))


def chosen(params: Sequence[Param], trial: TrialRecord) -> dict[str, object]:
    """The values of a trial as the recipe has them."""
    return {param.key: param.value(trial.params[param.key]) for param in params}


def sweep_data(sweep: Sweep, trials: Sequence[TrialRecord]) -> dict[str, Any]:
    """What programs read."""
    best = best_trial(sweep, trials)
    return {
        "command": "sweep", "inputs": [sweep.folder.name], "layers": 0, "parameters": 0,
        "details": [asdict(trial) for trial in trials],
        "totals": {
            "trials": len(trials), **{state: sum(trial.state == state for trial in trials)
                                      for state in dict.fromkeys(trial.state for trial in trials)},
            "metric": sweep.metric, "direction": sweep.direction, "best": best.value, "best_trial": best.number,
            "best_folder": best.folder, "best_params": best.params,
        },
        "notes": [f"trial {trial.number}: {trial.reason}" for trial in trials if trial.reason],
        "seconds": sum(trial.seconds or 0.0 for trial in trials),
    }  # fmt: skip


def trial_table(params: Sequence[Param], trials: Sequence[TrialRecord], metric: str) -> Table:
    """A row a trial."""
    keys = [param.key for param in params]
    rows = tuple(
        (x.number, x.state, x.value, *(x.params.get(key) for key in keys), max(x.evaluations, default=None),
         None if x.seconds is None else round(x.seconds, 1), x.folder, x.reason)
        for x in trials
    )  # fmt: skip
    return Table("trials", "Trials", ("trial", "state", metric, *keys, "steps", "seconds", "folder", "reason"), rows)


def _progress(sweep: Sweep, trials: Sequence[TrialRecord]) -> Iterator[Figure]:
    """Values in order with the best so far, and evaluations on the way."""
    better = max if sweep.direction == "maximize" else min
    numbers: list[float] = []
    values: list[float] = []
    running: list[float] = []
    for trial in trials:
        if trial.value is not None:
            numbers.append(float(trial.number))
            values.append(trial.value)
            running.append(better(running[-1], trial.value) if running else trial.value)
    yield Curves(
        "history", "Values in order", (Line("best so far", numbers, running), Line("trial", numbers, values)),
        x_label="trial", y_label=sweep.metric, log_y=False,
    )  # fmt: skip
    sign = -1 if sweep.direction == "maximize" else 1
    told = [trial for trial in trials if len(trial.evaluations) > 1]
    order = sorted(told, key=lambda trial: sign * trial.evaluations[max(trial.evaluations)])
    picked = order if len(order) <= CURVES else [*order[: CURVES // 2 + 1], *order[-(CURVES // 2) :]]
    lines = tuple(
        Line(f"trial {trial.number}{', pruned' if trial.state == 'pruned' else ''}",
             [float(step) for step in sorted(trial.evaluations)],
             [trial.evaluations[step] for step in sorted(trial.evaluations)])
        for trial in picked
    )  # fmt: skip
    if lines:
        more = f"The best and the worst of {len(order)} trials." if len(picked) < len(order) else ""
        yield Curves("evaluations", "Evaluations on the way", lines, y_label=sweep.metric, log_y=False, note=more)


def _importance(sweep: Sweep, study: optuna.Study) -> Iterator[Figure]:
    """Which key the value depends on, by functional analysis of variance of a random forest."""
    import optuna

    values = {t.value for t in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))}
    if len(sweep.params) < 2 or len(values) < LEAST_TO_WEIGH:
        return
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    yield Bars(
        "importance", "Importance", tuple(shares), tuple(shares.values()), value_label="share of the variance",
        value_format=".2f", note="fANOVA (Hutter et al. 2014), over the complete trials.",
    )  # fmt: skip


def _slices(sweep: Sweep, trials: Sequence[TrialRecord]) -> Iterator[Figure]:
    """The values over each key alone: those of every choice, or of every part of the range."""
    complete = [(trial.params, trial.value) for trial in trials if trial.value is not None]
    for param in sweep.params:
        found: dict[str, list[float]] = {}
        for values, value in sorted(complete, key=lambda pair: _place(param, pair[0][param.key])):
            found.setdefault(_part(param, values[param.key]), []).append(value)
        yield Bars(
            f"over-{param.key.replace('.', '-')}", param.key, tuple(found),
            tuple(sum(each) / len(each) for each in found.values()), points=tuple(map(tuple, found.values())),
            from_zero=False, value_label=f"{sweep.metric}, and its mean",
        )  # fmt: skip


def _place(param: Param, value: Any) -> float:
    """Where in its range a value lies, from 0 to 1; for choices, which one it is."""
    if param.choices:
        return float(param.labels.index(value))
    low, high, at = (map(math.log, (param.low, param.high, value)) if param.kind == "log" else
                     (param.low, param.high, float(value)))  # fmt: skip
    return (at - low) / (high - low)


def _part(param: Param, value: Any) -> str:
    """The name of the choice, or of the part of the range, that a value belongs to."""
    if param.choices:
        return str(value)
    part = min(int(PARTS * _place(param, value)), PARTS - 1)
    ends = []
    for share in (part / PARTS, (part + 1) / PARTS):
        linear = param.low + share * (param.high - param.low)
        ends.append(param.low * (param.high / param.low) ** share if param.kind == "log" else linear)
    return f"{ends[0]:.3g} to {ends[1]:.3g}"
