"""`ortho sweep`: search a recipe's keys for the best evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ortho_cli.cli.completion import recipes, words
from ortho_cli.cli.options import DebugOption, DryRunOption, JsonOption, QuietOption, VerboseOption

if TYPE_CHECKING:
    from ortho_cli.training.sweep import Sweep

__all__ = ["sweep"]

TRIALS_SHOWN = 10  # without --verbose


def sweep(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe file, or a shipped recipe's name.", autocompletion=recipes)
    ],
    params: Annotated[
        list[str] | None,
        typer.Option(
            "--param", metavar="KEY=VALUES", help="log:1e-5..1e-3, float:0..1, int:2..64, or a,b,c; repeatable."
        ),
    ] = None,
    metric: Annotated[
        str, typer.Option("--metric", metavar="NAME", help="What is judged, as in metrics.jsonl.")
    ] = "eval/accuracy",
    direction: Annotated[
        str, typer.Option("--direction", metavar="maximize|minimize", help="Which way is better.")
    ] = "maximize",
    trials: Annotated[int, typer.Option("--trials", metavar="N", help="How many in all, earlier ones included.")] = 20,
    storage: Annotated[
        str | None,
        typer.Option("--storage", metavar="URL", help="A database that machines share; default: a file in run.dir."),
    ] = None,
    sampler: Annotated[
        str,
        typer.Option(
            "--sampler",
            metavar="tpe|nsgaii|random",
            help="How values are chosen; nsgaii is evolutionary.",
            autocompletion=words("tpe", "nsgaii", "random"),
        ),
    ] = "tpe",
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe in all trials; repeatable."),
    ] = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Search a recipe's keys for the best evaluation; the same command goes on after Ctrl-C.

    Example: ortho sweep quickstart --param optimizer.lr=log:1e-3..1 --param methods.gor.penalty=log:1e-4..1 --trials 20

    Each trial is a run in its own folder below run.dir; one that evaluates worse than the median of the others is
    pruned. Many machines: the same command with one --storage on each.
    """
    from ortho_cli.cli.show import console_out, print_json, show_notes, table
    from ortho_cli.training.live import live_view
    from ortho_cli.training.sweep import plan_sweep, run_sweep
    from ortho_cli.training.sweep_report import best_trial, sweep_data, trial_table

    planned = plan_sweep(
        recipe, params or [], sets or [], metric=metric, direction=direction, trials=trials, sampler=sampler,
        storage=storage,
    )  # fmt: skip
    if dry_run:
        _plan(planned, recipe, as_json=as_json)
        return
    found, written = run_sweep(planned, observe=lambda title: live_view(title, hidden=quiet or as_json))
    data = sweep_data(planned, found)
    if as_json:
        outputs = [{"path": str(path), "bytes": path.stat().st_size} for path in written]
        print_json({**data, "inputs": [recipe], "outputs": outputs})
        return
    if quiet:
        return
    from ortho_cli.analysis.table import cell_text

    console, best = console_out(), best_trial(planned, found)
    sign = -1 if direction == "maximize" else 1
    order = sorted(found, key=lambda trial: (trial.value is None, sign * (trial.value or 0.0)))
    lines = trial_table(planned.params, found if verbose else order[:TRIALS_SHOWN], metric)
    if len(lines.rows) < len(found):
        console.print(f"the best {len(lines.rows)} of {len(found)} trials (all with -v)", style="bold")
    table(console, list(lines.headers), [list(map(cell_text, row)) for row in lines.rows])
    show_notes(console, data["notes"])
    console.print(f"best: {metric} {best.value:.4g} in {planned.folder / best.folder}", markup=False)
    for path in (path for path in written if path.parent == planned.folder):
        console.print(f"wrote {path}", markup=False)


def _plan(planned: Sweep, recipe: str, *, as_json: bool) -> None:
    """Say what would be searched, and where it would go; no database is opened."""
    from ortho_cli.cli.show import console_out, print_json, table
    from ortho_cli.training.sweep_study import FILE, shown_storage

    storage = shown_storage(planned.storage) if planned.storage else str(Path(planned.recipe.run.dir) / FILE)
    totals = {
        "metric": planned.metric, "direction": planned.direction, "trials": planned.trials, "sampler": planned.sampler,
        "storage": storage, "folder": str(planned.folder),
    }  # fmt: skip
    details = [{"key": param.key, "kind": param.kind, "values": param.text} for param in planned.params]
    if as_json:
        print_json({
            "command": "sweep", "dry_run": True, "inputs": [recipe], "outputs": [], "layers": 0, "parameters": 0,
            "details": details, "totals": totals, "notes": [], "seconds": 0.0,
        })  # fmt: skip
        return
    console = console_out()
    table(console, ["key", "kind", "values"], [list(line.values()) for line in details])
    table(console, None, list(totals.items()))
