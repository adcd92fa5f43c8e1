"""`ortho train`: carry out a training recipe."""

from __future__ import annotations

from typing import Annotated

import typer

from ortho_cli.cli.completion import recipes
from ortho_cli.cli.options import OUTPUT, DebugOption, DryRunOption, JsonOption, QuietOption

__all__ = ["train"]


def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe file, or a shipped recipe's name.", autocompletion=recipes)
    ],
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key, e.g. methods.hra.rank=16; repeatable."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last complete checkpoint.")] = False,
    force: Annotated[
        bool, typer.Option("-f", "--force", help="Begin anew in a run folder that exists.", rich_help_panel=OUTPUT)
    ] = False,
    cell: Annotated[
        int | None, typer.Option("--cell", metavar="N", help="Only cell N of a matrix recipe, counted from 0.")
    ] = None,
    debug_run: Annotated[
        str | None,
        typer.Option("--debug-run", metavar="step|overfit|profile", help="One step, three batches, or a profile."),
    ] = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Train with a recipe; a killed run goes on with --resume, bit for bit.

    Example: ortho train quickstart
    """
    from ortho_cli.cli.show import print_json
    from ortho_cli.recipe.train import load_train
    from ortho_cli.training.dry_run import describe

    loaded = load_train(recipe, sets or [])
    if dry_run:
        facts = describe(loaded)
        if as_json:
            print_json({"command": "train", "dry_run": True, **facts})
        else:
            from ortho_cli.cli.show import console_out, table

            table(console_out(), None, [(key.replace("_", " "), value) for key, value in facts.items()])
        return
    from ortho_cli.training.cells import run_recipe

    outcomes = run_recipe(
        recipe, sets or [], resume=resume, force=force, cell=cell, debug_run=debug_run, quiet=quiet or as_json
    )
    if as_json:
        details = [outcome.as_dict() for outcome in outcomes]
        print_json({"command": "train", "details": details})
        return
    if not quiet:
        from ortho_cli.cli.show import console_out, show_notes, table

        console = console_out()
        for outcome in outcomes:
            table(console, None, outcome.rows())
            show_notes(console, outcome.notes)
