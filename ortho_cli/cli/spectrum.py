"""`ortho analyze spectrum`: singular values and ranks of a checkpoint's layers."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ortho_cli.cli.completion import presets
from ortho_cli.cli.options import (
    FORMATS,
    OUTPUT,
    TARGETS,
    DebugOption,
    DryRunOption,
    ForceOption,
    FormatOption,
    JsonOption,
    QuietOption,
    VerboseOption,
)  # fmt: skip

__all__ = ["analyze_spectrum"]

SHOWN = ("name", "shape", "effective_rank", "stable_rank", "rank_90", "rank_95", "rank_99", "condition")
LAYERS_SHOWN = 10  # without --verbose


def analyze_spectrum(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="File, folder or hub id.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The folder to write the report to.", rich_help_panel=OUTPUT)
    ] = Path("spectrum-report"),
    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--targets",
            metavar="PATTERN|PRESET",
            autocompletion=presets,
            help="Globs or a preset; every layer by default.",
            rich_help_panel=TARGETS,
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", metavar="PATTERN", help="Layers to leave out.", rich_help_panel=TARGETS),
    ] = None,
    workers: Annotated[int | None, typer.Option("--workers", metavar="N", help="Layers at a time.")] = None,
    formats: FormatOption = FORMATS,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Show how the layers of a checkpoint use their rank: singular values, stable and effective rank, condition.

    Example: ortho analyze spectrum v1-5-pruned.safetensors --targets sd15-attention -o spectra
    """
    from ortho_cli.analysis.report import parse_formats
    from ortho_cli.analysis.report_folder import check_folder, write_folder
    from ortho_cli.analysis.spectrum import MARK, layer_table, measure, spectra, spectrum_data, spectrum_report
    from ortho_cli.analysis.table import cell_text
    from ortho_cli.checkpoints.layer_pool import default_workers
    from ortho_cli.checkpoints.store import open_checkpoint
    from ortho_cli.cli.progress import byte_bar
    from ortho_cli.cli.show import console_out, print_json, table

    kinds = parse_formats(formats)
    opened = open_checkpoint(checkpoint)
    check_folder(output, [file.path for file in opened.files], MARK, force=force)
    with byte_bar("spectra", hidden=quiet or as_json) as bar:
        values = spectra(
            opened,
            targets,
            exclude or [],
            workers=workers or default_workers(),
            **({"start": bar.start, "advance": bar.advance} if bar is not None else {}),
        )
    command = _command(checkpoint, targets or [], exclude or [])
    report = spectrum_report(opened, values, command)
    if dry_run:
        written: list[dict[str, object]] = [{"path": str(output / name)} for name in report.files(kinds)]
    else:
        written = write_folder(report, output, kinds, force=force)
    layers = measure(opened, values)
    if as_json:
        print_json({**spectrum_data(opened, layers, command), "outputs": written, "dry_run": dry_run})
        return
    if quiet:
        return
    order = layers if verbose else sorted(layers, key=lambda x: x.effective_rank / min(x.rows, x.cols))[:LAYERS_SHOWN]
    console, shown = console_out(), layer_table(order)
    if len(order) < len(layers):
        console.print(f"the {len(order)} of {len(layers)} layers that use their rank least (all with -v)", style="bold")
    places = [shown.headers.index(name) for name in SHOWN]
    table(
        console,
        [name.replace("_", " ") for name in SHOWN],
        [[cell_text(row[place]) for place in places] for row in shown.rows],
    )
    verb = "would write" if dry_run else "wrote"
    for item in written:
        console.print(f"{verb} {item['path']}", markup=False)


def _command(checkpoint: str, targets: list[str], exclude: list[str]) -> str:
    """The command as the report tells it: file names, no folders of this machine."""
    parts = ["ortho", "analyze", "spectrum", Path(checkpoint).name or checkpoint]
    parts += [word for pattern in targets for word in ("--targets", pattern)]
    parts += [word for pattern in exclude for word in ("--exclude", pattern)]
    return shlex.join(parts)
