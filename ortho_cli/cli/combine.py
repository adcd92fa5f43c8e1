"""`ortho combine`: several adapters in one."""

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
    PrivateOption,
    PushOption,
    QuietOption,
    RecipeOption,
    SaveRecipeOption,
    VerboseOption,
)  # fmt: skip

__all__ = ["combine"]

USAGE = "ortho combine ADAPTER[=W] ADAPTER[=W] [...] -o OUT"
ROTATIONS = "mean, compose, log-mean, orthomerge, slerp, grassmann"
SUMS = "linear, svd, ties, dare"


def combine(
    ctx: typer.Context,
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ADAPTER[=W]...",
            help="Two adapters or more; W is a share for means, a strength for compose and for sums.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The folder to write.", rich_help_panel=OUTPUT)
    ] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(
            "--mode",
            metavar="MODE",
            autocompletion=words(*ROTATIONS.split(", "), *SUMS.split(", ")),
            help=f"Of rotations: {ROTATIONS}. Of low-rank sums: {SUMS}. By default the first; repeat for both kinds.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    rank: Annotated[
        list[str] | None,
        typer.Option(
            "--rank",
            metavar="N|PATTERN=N",
            help="The most reflections or components of a layer; all that are needed by default.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base", metavar="BASE", help="Their base; rotations and sums together need it.", rich_help_panel=METHOD
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option("--density", help="Share of entries that ties and dare keep; half.", rich_help_panel=METHOD),
    ] = None,
    restore_angles: Annotated[
        bool,
        typer.Option(
            "--restore-angles", help="Turn on until the angles have the parts' mean norm.", rich_help_panel=METHOD
        ),
    ] = False,
    seed: Annotated[int | None, typer.Option("--seed", help="Of dare; 0.", rich_help_panel=METHOD)] = None,
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
    """Make one adapter of several: rotations stay rotations.

    Example: ortho combine style=0.4 subject=0.6 -o both --mode mean --rank 8

    The result is a plain PEFT HRA adapter, or a PEFT LoRA where low-rank sums take part. An adapter that lacks a layer
    leaves it as it is; means are among those that rotate.

    The table: the largest angle of each adapter and of the result; how much the order of two would matter (the norm of
    their commutator, 0 where planes are apart); how far the result is from orthogonal; the relative error of --rank.
    """
    values = gather(ctx, "combine")
    required(values, USAGE, "adapters", "output")
    from ortho_cli.cli.carry import carry

    def plan() -> object:
        from ortho_cli.checkpoints.adapters import read_adapter
        from ortho_cli.checkpoints.store import open_checkpoint
        from ortho_cli.surgery.combine import plan_combine
        from ortho_cli.surgery.strengths import split_strength

        split = [split_strength(item) for item in values["adapters"]]
        return plan_combine(
            [read_adapter(path) for path, _ in split],
            [weight for _, weight in split],
            values["output"],
            mode=values["mode"] or (),
            rank=values["rank"] or None,
            base=open_checkpoint(values["base"]) if values["base"] else None,
            density=values["density"],
            restore_angles=values["restore_angles"],
            seed=values["seed"],
            force_base=force,
        )

    carry(ctx, plan)
