"""`ortho merge`: fold adapters into weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ortho_cli.cli.arguments import gather, required
from ortho_cli.cli.completion import words
from ortho_cli.cli.options import (
    METHOD,
    OUTPUT,
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

__all__ = ["merge"]

USAGE = "ortho merge BASE ADAPTER[=S] [ADAPTER[=S] ...] -o OUT"


def merge(
    ctx: typer.Context,
    base: Annotated[str | None, typer.Argument(metavar="BASE", help="Checkpoint: file, folder or hub id.")] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ADAPTER[=S]]...",
            help="Adapters, applied in order, each at strength S; none to fold the one BASE itself holds.",
        ),
    ] = None,
    output: OutputOption = None,
    strength: StrengthOption = None,
    exact: Annotated[bool, typer.Option("--exact", help="Compute in float64.", rich_help_panel=METHOD)] = False,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            metavar="keep|fp16|bf16|fp32",
            autocompletion=words("keep", "fp16", "bf16", "fp32"),
            help="Float type of the whole output.",
            rich_help_panel=METHOD,
        ),
    ] = "keep",
    max_shard_size: ShardOption = None,
    keep_undo: Annotated[
        Path | None,
        typer.Option(
            "--keep-undo",
            metavar="FILE",
            help="Also write what ortho unmerge restores BASE from, byte for byte.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
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
    """Fold adapters of any readable kind into a checkpoint's weights.

    Example: ortho merge v1-5-pruned.safetensors my-hra-adapter=0.7 -o v1-5-merged.safetensors

    With --force an adapter that is bound to another base is accepted, too.
    """
    values = gather(ctx, "merge")
    required(values, USAGE, "base", "output")
    from ortho_cli.cli.carry import carry

    def plan() -> object:
        from ortho_cli.surgery.fit import open_all
        from ortho_cli.surgery.merge import plan_merge
        from ortho_cli.surgery.strengths import given_strengths

        paths, strengths = given_strengths(values["adapters"] or [], values["strength"] or [])
        return plan_merge(
            *open_all(values["base"], paths),
            values["output"],
            strengths=strengths,
            exact=values["exact"],
            dtype=values["dtype"],
            max_shard_size=values["max_shard_size"],
            keep_undo=values["keep_undo"],
            force_base=force,
        )

    carry(ctx, plan)
