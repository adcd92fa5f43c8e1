"""`ortho analyze adapter`: what an adapter does to each weight of its base."""

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
    FailAboveOption,
    FailBelowOption,
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
from ortho_cli.errors import UsageError, check_choice

__all__ = ["analyze_adapter"]

USAGE = "ortho analyze adapter BASE ADAPTER [-o FOLDER]"
COLUMNS = (
    "name", "kind", "rank", "relative_change", "effective_rank", "angle_max", "angle_mean", "defect",
    "intruders_output", "intruders_input",
)  # fmt: skip


def analyze_adapter(
    ctx: typer.Context,
    base: Annotated[str | None, typer.Argument(metavar="BASE", help="The checkpoint that the adapter acts on.")] = None,
    adapter: Annotated[
        str | None, typer.Argument(metavar="ADAPTER", help="HRA, LoRA, OFT, ...: file, folder or hub id.")
    ] = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The folder to write the report to.", rich_help_panel=OUTPUT)
    ] = Path("adapter-report"),
    targets: LayersOption = None,
    top: Annotated[
        int, typer.Option("--top", metavar="K", help="Leading singular vectors to look for new directions among.")
    ] = 10,
    threshold: Annotated[
        float, typer.Option("--threshold", metavar="COS", help="Below this best |cos| a direction is new.")
    ] = 0.5,
    metric: Annotated[
        str, typer.Option("--metric", metavar="NAME", help="What orders the table and limits hold to.")
    ] = "relative_change",
    fail_above: FailAboveOption = None,
    fail_below: FailBelowOption = None,
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
    """Show what an adapter does to each weight: rotation angles, size and rank of the change, new directions.

    Example: ortho analyze adapter base.safetensors runs/hra/export/hra -o adapter-report

    An intruder is one of the K leading singular vectors of the changed weight that is close to none of the old ones.
    """
    values = gather(ctx, "analyze-adapter")
    required(values, USAGE, "base", "adapter")
    from ortho_cli.analysis.adapter import METRICS, adapted_layers, adapter_changes, adapter_notes
    from ortho_cli.analysis.adapter_report import adapter_report
    from ortho_cli.analysis.limits import Limits
    from ortho_cli.analysis.report import parse_formats
    from ortho_cli.analysis.report_folder import check_folder
    from ortho_cli.checkpoints.adapters import read_adapter
    from ortho_cli.checkpoints.layer_pool import default_workers
    from ortho_cli.checkpoints.store import open_checkpoint
    from ortho_cli.cli.progress import byte_bar

    asked, metric = {name: values[name] for name in ("targets", "top", "threshold")}, values["metric"]
    if asked["top"] < 1:
        raise UsageError(f"--top {asked['top']}: look at one direction at least")
    if not 0 < asked["threshold"] < 1:
        raise UsageError(f"--threshold {asked['threshold']:g} is no cosine between 0 and 1")
    check_choice("--metric", metric, METRICS)
    limits, kinds = Limits(metric, values["fail_above"], values["fail_below"]), parse_formats(values["formats"])
    opened, found = open_checkpoint(values["base"]), read_adapter(values["adapter"])
    names = adapted_layers(opened, found, asked["targets"] or [])
    notes = adapter_notes(opened, found, names)
    inputs = [info.path for layer in found.layers.values() for info in layer.tensors.values()]
    check_folder(values["output"], [*(file.path for file in opened.files), *inputs], MARK, force=force)
    with byte_bar("adapter", hidden=quiet or as_json) as bar:
        measured = adapter_changes(
            opened,
            found,
            names,
            top=asked["top"],
            threshold=asked["threshold"],
            workers=workers or default_workers(),
            **({"start": bar.start, "advance": bar.advance} if bar is not None else {}),
        )
    layers = [change for change, _ in measured.values()]
    command = told_command("adapter", [values["base"], values["adapter"]], **asked)
    sign = -1 if metric.startswith("closest") else 1
    show_layers(
        ctx, adapter_report(opened, found, measured, command, notes, asked["threshold"]), layers,
        COLUMNS if metric in COLUMNS else (*COLUMNS, metric), values["output"], kinds,
        worst={x.name: sign * (getattr(x, metric) or 0.0) for x in layers},
        which=f"with the {'smallest' if sign < 0 else 'largest'} {metric}", limits=limits, notes=notes,
    )  # fmt: skip
