"""`ortho analyze spectrum`: singular values and ranks of a checkpoint's layers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ortho_cli.cli.arguments import gather, required
from ortho_cli.cli.layer_report import MARK, show_layers, told_command
from ortho_cli.cli.options import (
    FORMATS,
    OUTPUT,
    DebugOption,
    DryRunOption,
    ExcludeOption,
    ForceOption,
    FormatOption,
    JsonOption,
    LayersOption,
    QuietOption,
    RecipeOption,
    SaveRecipeOption,
    VerboseOption,
    WorkersOption,
)  # fmt: skip

__all__ = ["analyze_spectrum"]

USAGE = "ortho analyze spectrum CHECKPOINT [-o FOLDER]"
SHOWN = ("name", "shape", "effective_rank", "stable_rank", "rank_90", "rank_95", "rank_99", "condition")


def analyze_spectrum(
    ctx: typer.Context,
    checkpoint: Annotated[str | None, typer.Argument(metavar="CHECKPOINT", help="File, folder or hub id.")] = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The folder to write the report to.", rich_help_panel=OUTPUT)
    ] = Path("spectrum-report"),
    targets: LayersOption = None,
    exclude: ExcludeOption = None,
    workers: WorkersOption = None,
    formats: FormatOption = FORMATS,
    recipe: RecipeOption = None,
    save_recipe: SaveRecipeOption = None,
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
    values = gather(ctx, "analyze-spectrum")
    required(values, USAGE, "checkpoint")
    from ortho_cli.analysis.report import parse_formats
    from ortho_cli.analysis.report_folder import check_folder
    from ortho_cli.analysis.spectrum import measure, spectra, spectrum_report
    from ortho_cli.checkpoints.layer_pool import default_workers
    from ortho_cli.checkpoints.store import open_checkpoint
    from ortho_cli.cli.progress import byte_bar

    kinds = parse_formats(values["formats"])
    opened = open_checkpoint(values["checkpoint"])
    check_folder(values["output"], [file.path for file in opened.files], MARK, force=force)
    asked = {name: values[name] for name in ("targets", "exclude")}
    with byte_bar("spectra", hidden=quiet or as_json) as bar:
        found = spectra(
            opened,
            asked["targets"],
            asked["exclude"] or [],
            workers=workers or default_workers(),
            **({"start": bar.start, "advance": bar.advance} if bar is not None else {}),
        )
    layers = measure(opened, found)
    show_layers(
        ctx, spectrum_report(opened, found, told_command("spectrum", [values["checkpoint"]], **asked)),
        layers, SHOWN, values["output"], kinds, worst={x.name: -x.effective_rank / min(x.rows, x.cols) for x in layers},
        which="that use their rank least",
    )  # fmt: skip
