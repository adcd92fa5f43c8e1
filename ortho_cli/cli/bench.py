"""`ortho bench`: measure on your own machine, side by side with the plain alternative."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ortho_cli.cli.options import JsonOption

__all__ = ["app"]

app = typer.Typer(help="Measure on your own machine, beside the plain alternative.", no_args_is_help=True)


@app.callback()
def _bench() -> None:
    pass


@app.command("surgery")
def bench_surgery(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A .safetensors file; it is only read.")],
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Each command runs this often, shuffled.")] = 5,
    targets: Annotated[
        list[str] | None, typer.Option("--targets", metavar="PATTERN|PRESET", help="As for add-hra.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--folder", help="Where the outputs go for a moment; default beside the input.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Time and memory of add-hra and merge on your checkpoint, against copying the file.

    Example: ortho bench surgery v1-5-pruned.safetensors
    """
    from ortho_cli.cli.show import console_out, table
    from ortho_cli.cli.stopwatch import measure_surgery

    results = measure_surgery(Path(checkpoint), rounds=rounds, targets=targets or [], folder=folder)
    if as_json:
        listed = [result.as_dict() for result in results]
        typer.echo(json.dumps({"schema": 1, "ok": True, "command": "bench surgery", "details": listed}, indent=2))
        return
    rows = [
        (
            result.name,
            f"{result.median:.2f}",
            f"{result.ratio:.2f}",
            f"{result.lowest:.2f} - {result.highest:.2f}",
            f"{result.peak_bytes / 2**20:.0f}",
        )
        for result in results
    ]
    table(console_out(), ["command", "median s", "x copy", "range s", "peak MiB"], rows)
