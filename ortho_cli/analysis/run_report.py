"""What a run leaves to look at: `report.html`, pictures in `figures/`, and `README.md`, the model card."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from .conditioning import METHOD as CONDITIONING
from .conditioning import conditioning_parts
from .figure import Curves, Line
from .metric_names import is_share, metric_title, metric_value, slug, tail
from .model_card import CARD, card_text
from .recipe_text import public_recipe, recipe_line
from .report import Code, Fact, Part, Picture, Report
from .run_folder import Run, open_run
from .run_results import results_table
from .table import Table

__all__ = ["run_report", "write_run_report"]

SAMPLES = "samples/step-*[0-9]/samples.png"
ALONE = ("lr", "gradient_norm")  # not of the task: in pictures of their own
MAX_FACTS = 3  # metrics among the large numbers
MAX_SAMPLES = 6  # steps whose samples are shown


def write_run_report(folder: Path) -> list[Path]:
    """Write the report, the pictures and the model card of a run into its folder, in place of earlier ones.

    Args:
        folder: of a run of `ortho train`, finished or not.

    Returns:
        The files written.

    Raises:
        CheckpointError: no run, or a file of it is damaged.
        OutputError: a file cannot be written.

    Cost: about two seconds; no tensor is read.
    """
    run = open_run(folder)
    written = run_report(run).write(folder, ("html", "png"))
    card = Report(run.name, texts={CARD: card_text(run)})  # after the pictures that it shows
    return [*written, *card.write(folder, ())]


def run_report(run: Run) -> Report:
    """The report of a run, not yet written."""
    evaluated = [name for name in run.metrics if name.startswith("eval/")]
    facts = [Fact(metric_value(name, run.metrics[name].final), metric_title(name)) for name in headline(run)]
    if run.is_finished:
        facts += [
            Fact(f"{run.outcome['trainable']:,}", f"of {run.outcome['parameters']:,} parameters trained"),
            Fact(duration(run.outcome["seconds"]), f"for {run.outcome['step']:,} steps"),
        ]
    else:
        facts.append(Fact(f"{run.step:,}", "steps so far: the run is not finished"))
    report = Report(run.title, recipe_line(run.recipe), tuple(facts))
    report.section("Samples", _samples(run))
    report.section("Training", _training(run))
    report.section("Conditioning", conditioning_parts(run))
    report.section("Methods", _methods(run))
    report.section("Speed", _speed(run))
    report.section("Results", [results_table(run)] if evaluated else [])
    report.section("Recipe", _recipe(run))
    return report


def headline(run: Run) -> list[str]:
    """The metrics to open with: what the recipe calls best, then other evaluated ones, then the loss."""
    best = [run.recipe.run.best.metric] if run.recipe.run.best is not None else []
    evaluated = sorted((name for name in run.metrics if name.startswith("eval/")), key=lambda name: name == "eval/loss")
    names = [name for name in dict.fromkeys([*best, *evaluated, "train/loss"]) if name in run.metrics]
    return names[:MAX_FACTS]


def duration(seconds: float) -> str:
    """Seconds for people.

    >>> duration(5.68), duration(3725)
    ('5.7 s', '1 h 2 min')
    """
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _training(run: Run) -> Iterator[Part]:
    """A picture for each quantity of the task, training and evaluation together; then learning rate and gradient."""
    found = [name for name in run.metrics if name.startswith(("train/", "eval/")) and tail(name) not in ALONE]
    quantities = sorted({tail(name) for name in found}, key=lambda key: (key != "loss", key))
    for quantity in quantities:
        names = sorted((name for name in found if tail(name) == quantity), reverse=True)  # train before eval
        yield curves(run, quantity, names)
    for key in ALONE:
        if f"train/{key}" in run.metrics:
            yield curves(run, key, [f"train/{key}"])


def _samples(run: Run) -> Iterator[Part]:
    """What the model made, at some steps from the first to the last."""
    found = sorted((int(path.parent.name.removeprefix("step-")), path) for path in run.folder.glob(SAMPLES))
    count = min(len(found), MAX_SAMPLES)
    for place in range(count):
        step, path = found[place * (len(found) - 1) // max(1, count - 1)]
        yield Picture(path, f"Step {step:,}")


def curves(run: Run, quantity: str, names: list[str]) -> Curves:
    """One picture of some metrics of a run; the best evaluation is marked."""
    places = {"train": 0, "eval": 1}
    kept = run.recipe.run.best
    lines = []
    for name in names:
        series, group = run.metrics[name], name.split("/")[0]
        mark = None
        if kept is not None and name == kept.metric:
            step, value = series.best(kept.mode)
            mark = (step, value, f"best: {metric_value(name, value)} at step {step}")
        label = " ".join(name.split("/")[:-1])
        place = places.get(group) if len(names) <= len(places) else None
        lines.append(Line(label, series.steps, series.values, place=place, mark=mark))
    title = metric_title(names[-1]).removeprefix("train ")
    log = False if is_share(quantity) or quantity == "lr" else None
    return Curves(slug(quantity), title.capitalize(), tuple(lines), log_y=log)


def _methods(run: Run) -> Iterator[Part]:
    """A picture for each scalar of a method that changes; those that stay as they are in a table."""
    constant: list[tuple[object, ...]] = []
    for name in run.metrics:
        if not name.startswith("method/") or name.startswith(CONDITIONING):
            continue
        series = run.metrics[name]
        if len(set(series.values)) == 1:
            constant.append((metric_title(name), series.final))
            continue
        line = Line(tail(name), series.steps, series.values)
        yield Curves(slug(name), metric_title(name), (line,))
    if constant:
        yield Table("constant", "Unchanged throughout", ("scalar", "value"), tuple(constant))
    yield from run.outcome.get("notes", ())


def _speed(run: Run) -> Iterator[Part]:
    for name, title in (("steps_per_second", "Steps a second"), ("peak_gpu_bytes", "Peak GPU memory")):
        series = run.timing.get(name)
        if series is not None:
            unit = 1e-9 if name.endswith("bytes") else 1.0
            line = Line(title, series.steps, tuple(value * unit for value in series.values))
            yield Curves(slug(name), title, (line,), y_label="GB" if unit != 1.0 else "", log_y=False, from_zero=True)


def _recipe(run: Run) -> Iterator[Part]:
    yield "The same again:"
    yield Code(repeat_command(run))
    yield Code(public_recipe(run.recipe), summary="The resolved recipe, with every default")


def repeat_command(run: Run) -> str:
    """The command that repeats a run, from beside its folder."""
    again = shlex.quote(f"run.dir={run.name}-again")
    return f"ortho train {shlex.quote(f'{run.name}/recipe.yaml')} --set {again}"
