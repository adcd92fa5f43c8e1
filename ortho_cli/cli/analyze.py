"""`ortho analyze`: measure and compare what training left behind."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ortho_cli.cli.adapter import analyze_adapter
from ortho_cli.cli.conditioning import analyze_conditioning
from ortho_cli.cli.options import (
    FORMATS,
    OUTPUT,
    DebugOption,
    DryRunOption,
    ForceOption,
    FormatOption,
    JsonOption,
    QuietOption,
)
from ortho_cli.cli.orthogonality import analyze_orthogonality
from ortho_cli.cli.spectrum import analyze_spectrum
from ortho_cli.cli.stability import analyze_stability

__all__ = ["app"]

app = typer.Typer(help="Measure and compare what training left behind.", no_args_is_help=True)


@app.callback()
def _analyze() -> None:
    pass


app.command("spectrum")(analyze_spectrum)
app.command("stability")(analyze_stability)
app.command("orthogonality")(analyze_orthogonality)
app.command("adapter")(analyze_adapter)
app.command("conditioning")(analyze_conditioning)


@app.command("runs")
def analyze_runs(
    places: Annotated[
        list[str],
        typer.Argument(metavar="RUN", help="Folders of runs, or that hold some (a matrix)."),
    ],
    metrics: Annotated[
        list[str] | None,
        typer.Option("--metric", metavar="NAME", help="As in metrics.jsonl, * allowed; repeatable. Default: eval/*."),
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option("--group-by", metavar="KEY", help="Group by a recipe's key, as methods.hra.penalty; repeatable."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The folder to write the report to.", rich_help_panel=OUTPUT)
    ] = None,
    formats: FormatOption = FORMATS,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare runs: curves and final values with their spread over seeds, and what the recipes differ in.

    Example: ortho analyze runs runs/digits-resnet20-plain runs/digits-resnet20-gor -o comparison

    Runs whose recipes differ by the seed alone are one group. Without -o only the table is printed.
    """
    from ortho_cli.analysis.comparison_report import MARK, comparison_report, final_table
    from ortho_cli.analysis.report import parse_formats
    from ortho_cli.analysis.report_folder import check_folder, write_folder
    from ortho_cli.analysis.run_comparison import compare_runs
    from ortho_cli.analysis.run_folder import find_runs
    from ortho_cli.cli.show import console_out, print_json, show_notes, table

    kinds = parse_formats(formats)
    runs = find_runs(places)
    command = _command(places, metrics or [], by or [], output)
    comparison = compare_runs(runs, metrics=metrics or [], by=by or [], command=command)
    report = comparison_report(comparison)
    written: list[dict[str, object]] = []
    if output is not None:
        check_folder(output, [run.folder for run in runs], MARK, force=force)
        if dry_run:
            written = [{"path": str(output / name)} for name in report.files(kinds)]
        else:
            written = write_folder(report, output, kinds, force=force)
    if as_json:
        print_json({**(report.data or {}), "inputs": places, "outputs": written, "dry_run": dry_run})
        return
    if quiet:
        return
    console, shown = console_out(), final_table(comparison)
    table(console, list(shown.headers), [list(map(_cell, row)) for row in shown.rows])
    show_notes(console, comparison.notes)
    if output is not None:
        names = [Path(str(item["path"])).relative_to(output).as_posix() for item in written]
        pictures = [name for name in names if "/" in name]
        told = ", ".join(name for name in names if "/" not in name) + (f", {len(pictures)} figures" if pictures else "")
        console.print(f"{'would write' if dry_run else 'wrote'} {output}: {told}", markup=False)


def _cell(value: object) -> str:
    from ortho_cli.analysis.table import cell_text

    return cell_text(value)


def _command(places: Sequence[str], metrics: Sequence[str], by: Sequence[str], output: Path | None) -> str:
    """The command as the report tells it: no folder of this machine."""
    from ortho_cli.analysis.recipe_text import public_text

    words = ["ortho", "analyze", "runs", *map(public_text, places)]
    words += [word for metric in metrics for word in ("--metric", metric)]
    words += [word for key in by for word in ("--group-by", key)]
    words += ["-o", public_text(str(output))] if output is not None else []
    return shlex.join(words)
