"""Print a report: a table for people, one JSON object for programs. Names of tensors never pass as markup."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from ortho_cli.surgery.plan import Report

__all__ = ["console_out", "human_bytes", "print_json", "show_notes", "show_report", "table"]

WIDE = 250
LAYERS_SHOWN = 10  # in a table without --verbose
# Figures of a layer, where it has them.
MEASURED = (
    "relative_change", "angles_before", "largest_angle", "explained_by_rotation", "explained_by_lora", "explained",
    "order_effect", "defect", "relative_error", "energy", "activation_error", "plain_activation_error", "reason",
)  # fmt: skip
SHARES = ("relative_error", "energy", "explained_by_rotation", "explained_by_lora", "explained")
SCIENTIFIC = ("relative_change", "order_effect", "defect", "activation_error", "plain_activation_error")
Rows = Sequence[Sequence[object]]


def show_report(report: Report, *, as_json: bool, quiet: bool, verbose: bool) -> None:
    """Print what a writing verb did, or would do."""
    if as_json:
        print_json(report.as_dict())
        return
    if quiet:
        return
    console = console_out()
    if report.details:
        _layers(console, report, verbose)
    verb = "would write" if report.dry_run else "wrote"
    summary: list[tuple[str, object]] = []
    if report.layers:
        summary.append(("layers", f"{report.layers:,}"))
    if report.parameters:
        label = "parameters" if report.command == "factorize" else "adapter parameters"
        summary.append((label, f"{report.parameters:,}"))
    summary += [(name.replace("_", " "), _value(name, value)) for name, value in report.totals.items()]
    summary += [(verb, f"{item['path']}  {human_bytes(item['bytes'])}") for item in _main_outputs(report.outputs)]
    if not report.dry_run:
        summary.append(("seconds", f"{report.seconds:.1f}"))
    table(console, None, summary)
    show_notes(console, report.notes)


def print_json(content: Mapping[str, Any], *, ok: bool = True) -> None:
    """Print the one JSON object of a command; numbers that JSON lacks (inf, nan) become null."""
    typer.echo(json.dumps({"schema": 1, "ok": ok, **_strict(content)}, indent=2, default=str, allow_nan=False))


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show_notes(console: Console, notes: Iterable[str]) -> None:
    """One line for each note."""
    for note in dict.fromkeys(notes):
        console.print(_cell(f"note: {note}"), style="yellow", highlight=False, markup=False)


def console_out() -> Console:
    """The console of stdout."""
    from rich.console import Console

    class Piped(Console):
        """`ortho inspect ... | head`: a reader that has seen enough is no error."""

        def on_broken_pipe(self) -> None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0)

    # A pipe or a file has no width; lines there must not be folded for a terminal that does not exist.
    return Piped(highlight=False, markup=False, width=None if sys.stdout.isatty() else WIDE)


def table(console: Console, headers: Sequence[str] | None, rows: Iterable[Sequence[object]]) -> None:
    """A plain table; numbers to the right."""
    from rich.table import Table
    from rich.text import Text

    listed = [list(row) for row in rows]
    grid = Table(box=None, show_header=headers is not None, pad_edge=False, header_style="bold")
    width = len(headers) if headers is not None else max((len(row) for row in listed), default=0)
    for column in range(width):
        numeric = bool(listed) and all(_is_number(row[column]) for row in listed)
        title = headers[column] if headers is not None else ""
        grid.add_column(title, justify="right" if numeric and headers else "left", overflow="fold", no_wrap=numeric)
    for row in listed:
        grid.add_row(*(Text(_cell(value)) for value in row))
    console.print(grid)


def human_bytes(count: float) -> str:
    """Bytes in decimal units.

    >>> human_bytes(4_265_146_300)
    '4.27 GB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:,.2f} {unit}" if unit not in ("B",) else f"{count:.0f} B"
        count /= 1000
    raise AssertionError


def _layers(console: Console, report: Report, verbose: bool) -> None:
    """The layers: all with `verbose`, else those that changed most, or the first few."""
    columns = [key for key in ("kind", "shape", "dtype", "rank", "parameters", *MEASURED)]
    present = [key for key in columns if any(detail.get(key) is not None for detail in report.details)]
    details = list(report.details)
    title = None
    if not verbose and len(details) > LAYERS_SHOWN:
        change = next((key for key in ("relative_change", "relative_error") if key in present), None)
        if change is not None:
            details.sort(key=lambda detail: -float(detail.get(change) or 0.0))
            title = f"the {LAYERS_SHOWN} of {len(report.details)} layers that changed most (all with -v)"
        else:
            title = f"the first {LAYERS_SHOWN} of {len(report.details)} layers (all with -v)"
        details = details[:LAYERS_SHOWN]
        present = [key for key in present if any(detail.get(key) is not None for detail in details)]
    prefix = _common_prefix([str(detail["name"]) for detail in details])
    if prefix and title:
        title += f", all below {prefix}"
    if title:
        console.print(_cell(title), style="bold")
    headers = ["layer", *(key.replace("_", " ") for key in present)]
    start = len(prefix) if title else 0
    table(
        console,
        headers,
        [[detail["name"][start:], *(_detail(key, detail.get(key)) for key in present)] for detail in details],
    )
    console.print()


def _common_prefix(names: Sequence[str]) -> str:
    """The leading components that all names share, with their dot."""
    first, last = min(names).split("."), max(names).split(".")
    shared = [
        a for index, (a, b) in enumerate(zip(first, last, strict=False)) if first[: index + 1] == last[: index + 1]
    ]
    return ".".join(shared) + "." if shared and len(shared) < len(first) else ""


def _detail(key: str, value: object) -> str:
    if value is None:
        return "-"
    if key == "shape" and isinstance(value, list):
        if value and isinstance(value[0], list):
            return " ".join("x".join(map(str, shape)) for shape in value)
        return "x".join("?" if size is None else str(size) for size in value)
    if key == "angles_before" and isinstance(value, list):
        return " ".join(f"{angle:.4f}" for angle in value)
    if key in SCIENTIFIC and isinstance(value, float):
        return f"{value:.2e}"
    if key in SHARES and isinstance(value, float):
        return f"{value:.4f}"
    if key == "largest_angle" and isinstance(value, float):
        return f"{value:.4f} rad"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _main_outputs(outputs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Weight files; configurations and cards are told by their folder."""
    weights = [item for item in outputs if str(item["path"]).endswith(".safetensors")]
    return weights if len(weights) <= LAYERS_SHOWN else weights[:LAYERS_SHOWN]


def _value(name: str, value: object) -> str:
    if isinstance(value, int) and (name.endswith("bytes") or name.startswith(("bytes", "peak"))):
        return human_bytes(value)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_value('', item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _cell(value: object) -> str:
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in text)


def _is_number(value: object) -> bool:
    text = str(value).replace(",", "").removesuffix(" rad")
    if text == "-":
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True
