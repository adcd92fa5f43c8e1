"""`ortho bench geometry`: combining adapters, beside dense logarithms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ortho_cli.cli.options import JsonOption
from ortho_cli.errors import UsageError

__all__ = ["bench_geometry"]


def bench_geometry(
    adapters: Annotated[int, typer.Option("--adapters", min=2, help="How many are combined.")] = 3,
    rank: Annotated[int, typer.Option("--rank", min=2, help="Reflections a layer of each; even.")] = 8,
    mode: Annotated[
        list[str] | None, typer.Option("--mode", metavar="MODE", help="Of ortho combine; repeatable.")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Each command runs this often, shuffled.")] = 3,
    folder: Annotated[Path | None, typer.Option("--folder", help="Where adapters go for a moment.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Combining adapters of Stable Diffusion 1.5, in time and memory, against dense logarithms.

    Example: ortho bench geometry --adapters 3 --rank 8

    The dense form is timed on one layer of each width and multiplied by how many there are.
    """
    if rank % 2:
        raise UsageError(f"--rank {rank} is odd: such a chain is no rotation", hint=f"use --rank {rank + 1}")
    from ortho_cli.cli.geometry_stopwatch import measure_combine
    from ortho_cli.cli.show import console_out, print_json, table

    modes = mode or ["mean", "log-mean", "orthomerge", "compose"]
    found = measure_combine(adapters=adapters, rank=rank, modes=modes, rounds=rounds, folder=folder)
    if as_json:
        print_json({"command": "bench geometry", "details": [timing.as_dict() for timing in found]})
        return
    rows = [
        (timing.name, f"{timing.median:.2f}", f"{1 / timing.ratio:.1f}", f"{timing.peak_bytes / 2**20:.0f}")
        for timing in found
    ]
    table(console_out(), ["command", "median s", "x faster", "peak MiB"], rows)
