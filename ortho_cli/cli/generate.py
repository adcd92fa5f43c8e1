"""`ortho generate`: make things with a run's model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ortho_cli.cli.arguments import recipe_keys
from ortho_cli.cli.completion import words
from ortho_cli.cli.options import METHOD, OUTPUT, DebugOption, DryRunOption, JsonOption, QuietOption

__all__ = ["generate"]

ARGUMENTS = ("run", "output")  # the others are options of one maker or another


def generate(
    ctx: typer.Context,
    run: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a run of the task gan.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The folder to write; what is there is kept.", rich_help_panel=OUTPUT)
    ],
    num: Annotated[
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
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", min=0, help="Of the noise: 0.")] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", metavar="N", min=1, help="Values of a traversal: 9.", rich_help_panel=METHOD),
    ] = None,
    extent: Annotated[
        float | None,
        typer.Option("--extent", metavar="X", help="Coordinates go from -X to X: 4.", rich_help_panel=METHOD),
    ] = None,
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
    from ortho_cli.cli.progress import item_bar
    from ortho_cli.cli.show import console_out, print_json, show_notes, table
    from ortho_cli.training.generate import open_making

    making = open_making(run, _typed(ctx))
    if dry_run:
        plan = {**making.planned(), "would write": str(output)}
        if as_json:
            print_json({"command": "generate", "dry_run": True, "inputs": [run], **plan})
        else:
            table(console_out(), None, list(plan.items()))
        return
    with item_bar("generate", hidden=quiet or as_json) as bar:
        found = making.make(output, bar)
    outputs = [
        {"path": str(output / name), "bytes": (output / name).stat().st_size} for name in found.made + found.also
    ]
    if as_json:
        print_json({
            "command": "generate", "inputs": [run], "outputs": outputs, "checkpoint": found.checkpoint,
            "totals": {"made": len(found.made), "skipped": len(found.skipped)}, "notes": found.notes,
        })  # fmt: skip
    elif not quiet:
        rows = [("made", len(found.made)), ("skipped", len(found.skipped)), ("wrote", str(output))]
        table(console_out(), None, [*([("checkpoint", found.checkpoint)] if found.checkpoint else []), *rows])
        show_notes(console_out(), found.notes)


def _typed(ctx: typer.Context) -> dict[str, Any]:
    """The options that were typed, by their long names; each maker has its own defaults for the others."""
    keys = recipe_keys(ctx.command)
    return {
        keys[name]: ctx.params[name]
        for name in keys
        if name not in ARGUMENTS and str(ctx.get_parameter_source(name)).endswith("COMMANDLINE")
    }
