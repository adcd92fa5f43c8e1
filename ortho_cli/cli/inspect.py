"""`ortho inspect`: what a checkpoint or adapter is, and how two differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ortho_cli.cli.options import DebugOption, JsonOption, VerboseOption
from ortho_cli.errors import UsageError

if TYPE_CHECKING:
    from ortho_cli.surgery.plan import Report

__all__ = ["inspect"]


def inspect(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Checkpoint or adapter: file, folder, hub id.")
    ],
    layers: Annotated[bool, typer.Option("--layers", help="List every layer with its shape.")] = False,
    base: Annotated[
        str | None, typer.Option("--base", metavar="BASE", help="Whether this adapter belongs to BASE.")
    ] = None,
    list_globals: Annotated[
        bool, typer.Option("--globals", help="List what a pickle would import, without running it.")
    ] = False,
    other: Annotated[
        str | None, typer.Option("--diff", metavar="CHECKPOINT", help="Compare with another, tensor by tensor.")
    ] = None,
    fail_above: Annotated[
        float | None,
        typer.Option("--fail-above", metavar="X", help="With --diff: exit 5 above this relative difference."),
    ] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """Show what a checkpoint or adapter is; reads headers only.

    Example: ortho inspect v1-5-pruned.ckpt
    """
    from ortho_cli.cli.show import print_json
    from ortho_cli.surgery.inspect import inspect as describe
    from ortho_cli.surgery.inspect import inspect_globals

    if fail_above is not None and other is None:
        raise UsageError("--fail-above needs --diff", hint="ortho inspect A --diff B --fail-above 1e-6")
    if sum((list_globals, other is not None, base is not None)) > 1:
        raise UsageError("--globals, --diff and --base exclude each other")
    if other is not None:
        _diff(checkpoint, other, fail_above, as_json, verbose)
        return
    report = inspect_globals(checkpoint) if list_globals else describe(checkpoint, base=base, layers=layers)
    if as_json:
        print_json(report.as_dict())
    elif list_globals:
        for item in report.details:
            typer.echo(item["name"])
    else:
        _show(report)


DIFFERENCES_SHOWN = 10  # without --verbose; the rest is counted below the table


def _diff(checkpoint: str, other: str, fail_above: float | None, as_json: bool, verbose: bool) -> None:
    from ortho_cli.cli.progress import byte_bar
    from ortho_cli.cli.show import console_out, print_json, table
    from ortho_cli.surgery.diff import check_limit, diff, judge

    check_limit(fail_above)  # before gigabytes are compared
    with byte_bar("compare", hidden=as_json) as bar:
        report = diff(checkpoint, other, progress=bar)
    if as_json:
        judge(report, fail_above)  # a failure is the one JSON object, then
        print_json(report.as_dict())
        return
    console = console_out()
    if report.details:
        columns = ("name", "status", "shape", "dtype", "max_difference", "relative_difference")
        worst = sorted(report.details, key=lambda item: -float(item.get("relative_difference", float("inf"))))
        shown = report.details if verbose else worst[:DIFFERENCES_SHOWN]
        if len(shown) < len(report.details):
            console.print(f"the {len(shown)} of {len(report.details)} that differ most (all with -v)", style="bold")
        table(console, [name.replace("_", " ") for name in columns], [_diff_row(item, columns) for item in shown])
        console.print()
    table(console, None, [(key.replace("_", " "), value) for key, value in report.totals.items()])
    judge(report, fail_above)


def _diff_row(item: dict[str, Any], columns: tuple[str, ...]) -> list[str]:
    row = []
    for name in columns:
        value = item.get(name, "-")
        if name in ("shape", "dtype") and f"other_{name}" in item:
            value = f"{_shape(value)} / {_shape(item[f'other_{name}'])}"
        row.append(f"{value:.3g}" if isinstance(value, float) else _shape(value))
    return row


def _shape(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)


def _show(report: Report) -> None:
    from ortho_cli.checkpoints.header import printable
    from ortho_cli.cli.show import console_out, human_bytes, show_notes, table

    totals, console = report.totals, console_out()
    if report.details:
        keys = [
            key for key in ("kind", "shape", "dtype", "rank", "parameters") if any(key in x for x in report.details)
        ]
        table(
            console,
            ["layer", *keys],
            [[item["name"], *(_shape(item.get(key, "-")) for key in keys)] for item in report.details],
        )
        console.print()
    rows: list[tuple[str, str]] = [
        (report.inputs[0], f"{totals['format']}, {totals['layout']}, {totals['files']} file(s)"),
        ("tensors", f"{totals['tensors']:,} in {report.layers:,} layers"),
        ("parameters", f"{report.parameters:,}"),
        ("size", human_bytes(totals["bytes"])),
    ]
    rows += [
        (dtype, f"{entry['tensors']:,} tensors, {human_bytes(entry['bytes'])}")
        for dtype, entry in totals["dtypes"].items()
    ]
    table(console, None, rows)
    if len(totals["components"]) > 1:
        console.print()
        table(
            console,
            ["component", "tensors", "parameters", "size"],
            [
                (name, entry["tensors"], entry["parameters"], human_bytes(entry["bytes"]))
                for name, entry in list(totals["components"].items())[:20]
            ],
        )
    if "adapter" in totals:
        console.print()
        table(console, None, _adapter_rows(totals["adapter"]))
    if "factors" in totals:
        console.print()
        table(console, None, _factor_rows(totals["factors"]))
    for key, text in totals.get("made_by", {}).items():
        line = printable(f"{key}: {text if len(text) <= 160 else text[:157] + '...'}")
        console.print(line, markup=False, highlight=False)
    show_notes(console, report.notes)


def _factor_rows(factors: dict[str, Any]) -> list[tuple[str, str]]:
    low, high = factors["ranks"]
    return [
        ("factors", f"{factors['layers']:,} layers, rank {low if low == high else f'{low} to {high}'}"),
        ("their parameters", f"{factors['parameters']:,}, instead of {factors['dense_parameters']:,}"),
        ("load with", "ortho.load_factorized(model, PATH); dense again: ortho convert PATH --to dense"),
    ]


def _adapter_rows(adapter: dict[str, Any]) -> list[tuple[str, str]]:
    ranks = ", ".join(f"{rank} ({count} layers)" for rank, count in adapter["ranks"].items()) or "-"
    rows = [
        ("adapter", f"{adapter['kind']} ({adapter['dialect']}), {adapter['layers']:,} layers"),
        ("rank", ranks),
        ("adapter parameters", f"{adapter['parameters']:,}"),
        ("bound to its base", "yes: right on that base only" if adapter["base_bound"] else "no"),
    ]
    fits = adapter.get("fits_base")
    if fits is not None:
        answers = {True: "fits", False: "does not fit", None: "unknown"}
        verdict = ", ".join(f"{key}: {answers[fits[key]]}" for key in ("names", "shapes", "fingerprint"))
        rows.append((f"base {fits['base']}", verdict + (f"; {fits['reason']}" if fits["reason"] else "")))
    return rows
