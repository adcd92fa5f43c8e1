"""What the verbs that measure layers have in common: a folder with the report, a table of the worst, limits."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ortho_cli.cli.arguments import keep_recipe

if TYPE_CHECKING:
    import typer

    from ortho_cli.analysis.limits import Limits
    from ortho_cli.analysis.report import Report

__all__ = ["MARK", "show_layers", "told_command"]

MARK = "layers.csv"  # by which an earlier report is known
LAYERS_SHOWN = 10  # without --verbose


def show_layers(
    ctx: typer.Context,
    report: Report,
    layers: Sequence[Any],
    columns: Sequence[str],
    output: Path,
    kinds: Sequence[str],
    *,
    worst: Mapping[str, float],
    which: str,
    limits: Limits | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Write a report of layers, print its table or its data, and hold it to limits.

    Args:
        ctx: the running command, with the options on how to write and show.
        report: with its `data`.
        layers: records with a `name`, in file order.
        columns: their fields that the table has.
        output: the folder, which was checked before.
        kinds: the formats.
        worst: layer -> number; the largest are shown first.
        which: what these are, e.g. "that use their rank least".
        limits: held to `limits.metric` of the layers, after everything is written.
        notes: below the table.

    Raises:
        NumericsError: a layer is beyond the limits.
    """
    from ortho_cli.analysis.report_folder import write_folder
    from ortho_cli.analysis.table import cell_text, record_table
    from ortho_cli.cli.show import console_out, print_json, show_notes, table

    options = ctx.params
    if options["dry_run"]:
        written: list[dict[str, object]] = [{"path": str(output / name)} for name in report.files(kinds)]
    else:
        written = write_folder(report, output, kinds, force=options["force"])
        keep_recipe(ctx)
    held = {} if limits is None else {layer.name: getattr(layer, limits.metric) for layer in layers}
    if options["as_json"]:
        if limits is not None:
            limits.check(held)  # a failure is the one JSON object, then
        print_json({**(report.data or {}), "outputs": written, "dry_run": options["dry_run"]})
        return
    if not options["quiet"]:
        few = sorted(layers, key=lambda layer: -worst[layer.name])[:LAYERS_SHOWN]
        order, console = layers if options["verbose"] else few, console_out()
        if len(order) < len(layers):
            console.print(f"the {len(order)} of {len(layers)} layers {which} (all with -v)", style="bold")
        lines = record_table("", "", order)
        places = [lines.headers.index(name) for name in columns]
        rows = [[cell_text(row[place]) for place in places] for row in lines.rows]
        table(console, [name.replace("_", " ") for name in columns], rows)
        show_notes(console, notes)
        for item in written:
            console.print(f"{'would write' if options['dry_run'] else 'wrote'} {item['path']}", markup=False)
    if limits is not None:
        limits.check(held)


def told_command(verb: str, inputs: Sequence[str], **options: object) -> str:
    """The command as a report tells it: file names, no folders of this machine; options that are None left out.

    >>> told_command("spectrum", ["/data/a.safetensors"], targets=["*.q"], workers=None)
    "ortho analyze spectrum a.safetensors --targets '*.q'"
    """
    words = ["ortho", "analyze", verb, *(Path(name).name or name for name in inputs)]
    for name, value in options.items():
        given = value if isinstance(value, list) else [value]
        words += [word for each in given if each is not None for word in (f"--{name.replace('_', '-')}", str(each))]
    return shlex.join(words)
