"""`ortho unmerge`: take adapters out of weights they were folded into."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ortho_cli.cli.arguments import gather, required
from ortho_cli.cli.options import (
    METHOD,
    DebugOption,
    DryRunOption,
    ForceOption,
    JsonOption,
    OutputOption,
    PrivateOption,
    PushOption,
    QuietOption,
    RecipeOption,
    SaveRecipeOption,
    ShardOption,
    StrengthOption,
    VerboseOption,
)  # fmt: skip

__all__ = ["unmerge"]

USAGE = "ortho unmerge MERGED --undo FILE -o BASE, or ortho unmerge MERGED ADAPTER [ADAPTER ...] -o BASE"


def unmerge(
    ctx: typer.Context,
    merged: Annotated[str | None, typer.Argument(metavar="MERGED", help="What was merged: file or folder.")] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ADAPTER[=S]]...", help="Without --undo: what was merged, in the same order."),
    ] = None,
    output: OutputOption = None,
    undo: Annotated[
        Path | None,
        typer.Option(
            "--undo",
            metavar="FILE",
            help="What merge --keep-undo wrote: every byte of the base comes back.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    strength: StrengthOption = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Compute inverses in float64.", rich_help_panel=METHOD)
    ] = False,
    max_shard_size: ShardOption = None,
    recipe: RecipeOption = None,
    save_recipe: SaveRecipeOption = None,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    push_to_hub: PushOption = None,
    private: PrivateOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Restore the base of a merged checkpoint: every byte with an undo file, to rounding by the adapters' inverses.

    Example: ortho unmerge v1-5-merged.safetensors --undo v1-5.undo.safetensors -o v1-5-again.safetensors
    """
    values = gather(ctx, "unmerge")
    required(values, USAGE, "merged", "output")
    from ortho_cli.cli.carry import carry

    def plan() -> object:
        from ortho_cli.surgery.strengths import given_strengths
        from ortho_cli.surgery.unmerge import plan_unmerge

        paths, strengths = given_strengths(values["adapters"] or [], values["strength"] or [])
        return plan_unmerge(
            values["merged"],
            paths,
            values["output"],
            undo=values["undo"],
            strengths=strengths,
            exact=values["exact"],
            max_shard_size=values["max_shard_size"],
        )

    carry(ctx, plan)
