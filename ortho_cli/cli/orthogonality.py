"""`ortho analyze orthogonality`: how orthogonal a checkpoint's layers and their groups of filters are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ortho_cli.cli.layer_report import MARK, Shown, show_layers, told_command
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
    VerboseOption,
    WorkersOption,
)  # fmt: skip
from ortho_cli.errors import UsageError, check_choice

__all__ = ["analyze_orthogonality"]

SHOWN = (
    "name", "shape", "side", "scale_free", "normalized", "residual", "coherence", "groups", "inter", "intra",
)  # fmt: skip


def analyze_orthogonality(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="File, folder or hub id.")],
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
    from ortho_cli.analysis.limits import Limits
    from ortho_cli.analysis.orthogonality import METRICS, group_notes, orthogonality, orthogonality_report
    from ortho_cli.analysis.report import parse_formats
    from ortho_cli.analysis.report_folder import check_folder
    from ortho_cli.checkpoints.layer_pool import default_workers
    from ortho_cli.checkpoints.store import open_checkpoint
    from ortho_cli.cli.progress import byte_bar

    if groups < 1:
        raise UsageError(f"--groups {groups}: a layer has at least one group")
    check_choice("--metric", metric, METRICS)
    limits, kinds = Limits(metric, fail_above, fail_below), parse_formats(formats)
    opened = open_checkpoint(checkpoint)
    check_folder(output, [file.path for file in opened.files], MARK, force=force)
    with byte_bar("orthogonality", hidden=quiet or as_json) as bar:
        layers = orthogonality(
            opened,
            targets,
            exclude or [],
            groups=groups,
            workers=workers or default_workers(),
            **({"start": bar.start, "advance": bar.advance} if bar is not None else {}),
        )
    command = told_command("orthogonality", [checkpoint], groups=groups, targets=targets, exclude=exclude)
    shown = SHOWN if metric in SHOWN else (*SHOWN[:3], metric, *SHOWN[3:])
    how = Shown(output, kinds, force, dry_run, as_json, quiet, verbose)
    show_layers(
        orthogonality_report(opened, layers, command), layers, shown, how,
        worst={x.name: getattr(x, metric) or 0.0 for x in layers}, which=f"with the largest {metric}", limits=limits,
        notes=group_notes(layers),
    )  # fmt: skip
