"""`ortho add-hra`: Householder adapters into a checkpoint."""

from __future__ import annotations

from typing import Annotated

import typer

from ortho_cli.cli.arguments import gather, required
from ortho_cli.cli.completion import presets, words
from ortho_cli.cli.options import (
    METHOD,
    OUTPUT,
    TARGETS,
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
    VerboseOption,
)  # fmt: skip

__all__ = ["add_hra"]

USAGE = "ortho add-hra CHECKPOINT -o OUT"


def add_hra(
    ctx: typer.Context,
    checkpoint: Annotated[str | None, typer.Argument(metavar="CHECKPOINT", help="File, folder or hub id.")] = None,
    output: OutputOption = None,
    rank: Annotated[
        list[str] | None,
        typer.Option(
            "--rank",
            metavar="N|PATTERN=N",
            help="Reflections a layer, even (default 8); repeatable.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    gram_schmidt: Annotated[
        bool,
        typer.Option("--gram-schmidt", help="The orthogonalised variant, started at identity.", rich_help_panel=METHOD),
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of the start vectors.", rich_help_panel=METHOD)] = 0,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--targets",
            metavar="PATTERN|PRESET",
            autocompletion=presets,
            rich_help_panel=TARGETS,
            help="Globs or a preset: sd15-control, sd15-attention, llama-qv, llama-all, bert-all, deberta-all, ...",
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", metavar="PATTERN", help="Layers to leave out.", rich_help_panel=TARGETS),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            "--as",
            metavar="adapter|checkpoint",
            autocompletion=words("adapter", "checkpoint"),
            rich_help_panel=OUTPUT,
            help="A PEFT folder beside the base, or the whole checkpoint; by default by the output's name.",
        ),
    ] = None,
    layout: Annotated[
        str,
        typer.Option(
            "--layout",
            metavar="keep|hra-repo",
            autocompletion=words("keep", "hra-repo"),
            help="hra-repo: as the HRA authors' loader wants.",
            rich_help_panel=OUTPUT,
        ),
    ] = "keep",
    ema: Annotated[
        str | None,
        typer.Option(
            "--ema",
            metavar="use|keep|drop",
            autocompletion=words("use", "keep", "drop"),
            help="What to do with model_ema tensors (default keep).",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
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
    """Put Householder reflection adapters (HRA) into a checkpoint.

    Example: ortho add-hra v1-5-pruned.ckpt -o v1-5-hra.safetensors --rank 8
    """
    values = gather(ctx, "add-hra")
    required(values, USAGE, "checkpoint", "output")
    from ortho_cli.cli.carry import carry
    from ortho_cli.surgery.add_hra import plan_add_hra

    source = values.pop("checkpoint")
    ranks = values.pop("rank") or ["8"]
    options = {**values, "rank": ranks, "exclude": values["exclude"] or []}

    def plan() -> object:
        from ortho_cli.checkpoints.store import open_checkpoint

        return plan_add_hra(open_checkpoint(source), **options)

    carry(ctx, plan)
