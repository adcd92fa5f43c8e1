"""`ortho generate`: make pictures with a run's generator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ortho_cli.cli.completion import words
from ortho_cli.cli.options import METHOD, OUTPUT, DebugOption, DryRunOption, JsonOption, QuietOption
from ortho_cli.errors import UsageError

__all__ = ["generate"]

# The published defaults: traversals and the pairs' shared noise are truncated, samples are not.
NUMBER = {"pictures": 64, "traverse": 8}
TRUNCATION = {"pictures": 1.0, "traverse": 0.7, "pairs": 1.0}


def generate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run of the task gan.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The folder to write; what is there is kept.", rich_help_panel=OUTPUT)
    ],
    number: Annotated[
        int | None, typer.Option("--num", metavar="N", min=1, help="Pictures (64), or rows of a traversal (8).")
    ] = None,
    traverse: Annotated[
        bool, typer.Option("--traverse", help="A grid for each coordinate: rows are pictures, columns its values.")
    ] = False,
    pairs: Annotated[
        int | None,
        typer.Option("--pairs", metavar="N", min=1, help="Pairs that differ in one coordinate, with labels.npy."),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--checkpoint",
            metavar="best|last|STEP",
            help="Default: best, else last.",
            autocompletion=words("best", "last"),
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Of the noise.")] = 0,
    steps: Annotated[
        int, typer.Option("--steps", metavar="N", min=2, help="Values of a traversal.", rich_help_panel=METHOD)
    ] = 9,
    extent: Annotated[
        float, typer.Option("--extent", metavar="X", help="Coordinates go from -X to X.", rich_help_panel=METHOD)
    ] = 4.0,
    truncation: Annotated[
        float | None,
        typer.Option("--truncation", metavar="T", help="Scales the noise: 1, traversals 0.7.", rich_help_panel=METHOD),
    ] = None,
    sefa: Annotated[
        bool,
        typer.Option("--sefa", help="Turn the code to the directions its weights stretch.", rich_help_panel=METHOD),
    ] = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Make pictures with a run's generator; what is there already is skipped, so that a killed job goes on.

    Example: ortho generate runs/digits-eigengan --traverse -o traversals
    """
    from ortho_cli.cli.show import console_out, print_json, table
    from ortho_cli.training.generate import MANIFEST, Wanted, generate_run, planned

    if traverse and pairs is not None:
        raise UsageError("--traverse and --pairs make different things", hint="leave one of them out")
    if pairs is not None and number is not None:
        raise UsageError("--pairs says how many already", hint="leave out --num")
    if extent <= 0 or (truncation is not None and truncation <= 0):
        raise UsageError("--extent and --truncation are above 0", hint="e.g. --extent 4 --truncation 0.7")
    if pairs is not None and truncation is not None:
        raise UsageError("--truncation is for pictures and traversals; pairs have a fixed one", hint="leave it out")
    kind = "traverse" if traverse else "pairs" if pairs is not None else "pictures"
    wanted = Wanted(kind, pairs or number or NUMBER[kind], seed, steps, extent, truncation or TRUNCATION[kind], sefa)
    if dry_run:
        plan = {"kind": kind, "files": planned(run, wanted), "would write": str(output)}
        if as_json:
            print_json({"command": "generate", "dry_run": True, "inputs": [str(run)], **plan})
        else:
            table(console_out(), None, list(plan.items()))
        return
    found = generate_run(run, output, wanted, checkpoint=checkpoint)
    names = [*found["made"], MANIFEST]
    outputs = [{"path": str(output / name), "bytes": (output / name).stat().st_size} for name in names]
    if as_json:
        print_json({
            "command": "generate", "inputs": [str(run)], "outputs": outputs, "checkpoint": found["checkpoint"],
            "totals": {"made": len(found["made"]), "skipped": len(found["skipped"])},
        })  # fmt: skip
    elif not quiet:
        rows = [("checkpoint", found["checkpoint"]), ("made", len(found["made"])), ("skipped", len(found["skipped"]))]
        table(console_out(), None, [*rows, ("wrote", str(output))])
