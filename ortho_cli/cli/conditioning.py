"""`ortho analyze conditioning`: how well conditioned the covariances of layers were, over the training of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ortho_cli.cli.layer_report import told_command
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

__all__ = ["analyze_conditioning"]


def analyze_conditioning(
    places: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Folders of runs, or that hold some (a matrix)."),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The folder to write the report to.", rich_help_panel=OUTPUT)
    ] = Path("conditioning-report"),
    by: Annotated[
        list[str] | None,
        typer.Option("--group-by", metavar="KEY", help="Group by a recipe's key, as methods.whiten.ridge; repeatable."),
    ] = None,
    formats: FormatOption = FORMATS,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Show how well conditioned the covariances of layers were while runs trained, seeds together.

    Example: ortho analyze conditioning runs/digits-whiten -o conditioning

    For runs with the method track_conditioning: condition number, ends of the spectrum, rank and effective rank over
    the steps, beside what the runs reached.
    """
    from ortho_cli.analysis.conditioning_report import MARK, conditioning_report
    from ortho_cli.analysis.report import parse_formats
    from ortho_cli.analysis.report_folder import check_folder, write_folder
    from ortho_cli.analysis.run_folder import find_runs
    from ortho_cli.analysis.table import Table, cell_text
    from ortho_cli.cli.show import console_out, print_json, show_notes, table

    kinds = parse_formats(formats)
    runs = find_runs(places)
    command = told_command("conditioning", places, group_by=by)
    report = conditioning_report(runs, by=by or [], command=command)
    check_folder(output, [run.folder for run in runs], MARK, force=force)
    if dry_run:
        written: list[dict[str, object]] = [{"path": str(output / name)} for name in report.files(kinds)]
    else:
        written = write_folder(report, output, kinds, force=force)
    data = report.data or {}
    if as_json:
        print_json({**data, "inputs": places, "outputs": written, "dry_run": dry_run})
        return
    if quiet:
        return
    console = console_out()
    shown = next(part for part in report.parts() if isinstance(part, Table))
    table(console, list(shown.headers), [[cell_text(cell) for cell in row] for row in shown.rows])
    show_notes(console, data["notes"])
    console.print(f"{'would write' if dry_run else 'wrote'} {len(written)} files into {output}", markup=False)
