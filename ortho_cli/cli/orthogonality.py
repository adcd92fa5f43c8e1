"""`ortho analyze orthogonality`: how orthogonal a checkpoint's layers and their groups of filters are."""

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

__all__ = ["analyze_orthogonality"]

USAGE = "ortho analyze orthogonality CHECKPOINT [-o FOLDER]"
SHOWN = (
    "name", "shape", "side", "scale_free", "normalized", "residual", "coherence", "groups", "inter", "intra",
)  # fmt: skip


def analyze_orthogonality(
    ctx: typer.Context,
    checkpoint: Annotated[str | None, typer.Argument(metavar="CHECKPOINT", help="File, folder or hub id.")] = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The folder to write the report to.", rich_help_panel=OUTPUT)
    ] = Path("orthogonality-report"),
    groups: Annotated[int, typer.Option("--groups", metavar="N", help="The most groups of filters, as for gor.")] = 32,
    targets: LayersOption = None,
    exclude: ExcludeOption = None,
    metric: Annotated[
        str, typer.Option("--metric", metavar="NAME", help="What orders the table and limits hold to.")
    ] = "scale_free",
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
    """Show how far the layers of a checkpoint are from orthogonal, as a whole and in GOR's groups of filters.

    Example: ortho analyze orthogonality runs/digits-resnet20-gor --groups 4 --fail-above 0.5

    scale_free is 0 for orthogonal vectors of any one length and 1 where all are parallel; residual is ||W W^T - I||,
    normalized the same over the root of the number of vectors; coherence is the largest |cos| of two of them; inter
    and intra are GOR's penalties.
    """
    values = gather(ctx, "analyze-orthogonality")
    required(values, USAGE, "checkpoint")
    from ortho_cli.analysis.limits import Limits
    from ortho_cli.analysis.orthogonality import METRICS, group_notes, orthogonality, orthogonality_report
    from ortho_cli.analysis.report import parse_formats
    from ortho_cli.analysis.report_folder import check_folder
    from ortho_cli.checkpoints.layer_pool import default_workers
    from ortho_cli.checkpoints.store import open_checkpoint
    from ortho_cli.cli.progress import byte_bar

    asked, metric = {name: values[name] for name in ("groups", "targets", "exclude")}, values["metric"]
    if asked["groups"] < 1:
        raise UsageError(f"--groups {asked['groups']}: a layer has at least one group")
    check_choice("--metric", metric, METRICS)
    limits = Limits(metric, values["fail_above"], values["fail_below"])
    kinds, opened = parse_formats(values["formats"]), open_checkpoint(values["checkpoint"])
    check_folder(values["output"], [file.path for file in opened.files], MARK, force=force)
    with byte_bar("orthogonality", hidden=quiet or as_json) as bar:
        layers = orthogonality(
            opened,
            asked["targets"],
            asked["exclude"] or [],
            groups=asked["groups"],
            workers=workers or default_workers(),
            **({"start": bar.start, "advance": bar.advance} if bar is not None else {}),
        )
    command = told_command("orthogonality", [values["checkpoint"]], **asked)
    shown = SHOWN if metric in SHOWN else (*SHOWN[:3], metric, *SHOWN[3:])
    show_layers(
        ctx, orthogonality_report(opened, layers, command), layers, shown, values["output"], kinds,
        worst={x.name: getattr(x, metric) or 0.0 for x in layers}, which=f"with the largest {metric}", limits=limits,
        notes=group_notes(layers),
    )  # fmt: skip
