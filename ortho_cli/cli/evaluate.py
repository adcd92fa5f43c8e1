"""`ortho evaluate`: judge a run's model again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ortho_cli.cli.completion import words
from ortho_cli.cli.options import OUTPUT, DebugOption, DryRunOption, ForceOption, JsonOption, QuietOption

__all__ = ["evaluate"]


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, the run.dir of its recipe.")],
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--checkpoint",
            metavar="best|last|STEP",
            help="Default: best, else last.",
            autocompletion=words("best", "last"),
        ),
    ] = None,
    metrics: Annotated[
        str | None, typer.Option("--metrics", metavar="LIST", help="Names with commas; default: all there are.")
    ] = None,
    split: Annotated[
        str, typer.Option("--split", metavar="val|train", help="Of the data.", autocompletion=words("val", "train"))
    ] = "val",
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key of data, as data.classes=[0,1]; repeatable."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The folder to write; default: RUN/evaluation.", rich_help_panel=OUTPUT),
    ] = None,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Evaluate a run's best model: by class, by more metrics, on other data; writes evaluation.json and a report.

    Example: ortho evaluate runs/quickstart --set 'data.classes=[5,6,7,8,9]' -o second-half

    A metric whose library is missing is skipped by name, with the command that fetches it.
    """
    from ortho_cli.analysis.evaluation import MARK, evaluation_report, metric_table
    from ortho_cli.analysis.report_folder import check_folder, write_folder
    from ortho_cli.analysis.run_folder import open_run
    from ortho_cli.cli.show import console_out, print_json, show_notes, table
    from ortho_cli.training.evaluate import evaluate_run, find_checkpoint
    from ortho_cli.training.processes import is_first, leave

    folder = output or run / "evaluation"
    open_run(run)
    state = find_checkpoint(run, checkpoint)
    check_folder(folder, [state], MARK, force=force)
    names = [name.strip() for name in metrics.split(",") if name.strip()] if metrics is not None else None
    if dry_run:
        found = {"checkpoint": state.name, "split": split, "would write": str(folder / MARK)}
        if as_json:
            print_json({"command": "evaluate", "dry_run": True, "inputs": [str(run)], **found})
        else:
            table(console_out(), None, list(found.items()))
        return
    try:
        evaluation = evaluate_run(run, checkpoint=checkpoint, metrics=names, split=split, sets=sets or [])
    finally:
        leave()
    if not is_first():
        return
    report = evaluation_report(evaluation)
    written = write_folder(report, folder, ("html", "png", "csv", "json"), force=force)
    if as_json:
        print_json({"command": "evaluate", "inputs": [str(run)], "outputs": written, **(report.data or {})})
    elif not quiet:
        console, shown = console_out(), metric_table(evaluation)
        table(console, None, [(f"{evaluation.checkpoint}, {split}", f"{evaluation.samples:,} samples"), *shown.rows])
        show_notes(console, map(str, evaluation.skipped))
        console.print(f"wrote {folder}", markup=False)
