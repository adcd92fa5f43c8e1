"""`ortho extract`: an adapter out of a fine-tuned checkpoint."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ortho_cli.cli.arguments import gather, required
from ortho_cli.cli.completion import presets, words
from ortho_cli.cli.options import (
    METHOD,
    TARGETS,
    DebugOption,
    DryRunOption,
    ExcludeOption,
    ForceOption,
    JsonOption,
    OutputOption,
    PrivateOption,
    PushOption,
    QuietOption,
    RecipeOption,
    SaveRecipeOption,
    VerboseOption,
)  # fmt: skip

__all__ = ["extract"]

USAGE = "ortho extract BASE TUNED -o ADAPTER --kind hra|lora|both"


def extract(
    ctx: typer.Context,
    base: Annotated[str | None, typer.Argument(metavar="BASE", help="File, folder or hub id.")] = None,
    tuned: Annotated[
        str | None, typer.Argument(metavar="TUNED", help="What became of it by training; in any layout.")
    ] = None,
    output: OutputOption = None,
    kind: Annotated[
        str,
        typer.Option(
            "--kind",
            metavar="hra|lora|both",
            autocompletion=words("hra", "lora", "both"),
            help="A rotation, a low-rank sum, or rotation/ and the sum of what it leaves in residual/.",
            rich_help_panel=METHOD,
        ),
    ] = "hra",
    rank: Annotated[
        list[str] | None,
        typer.Option(
            "--rank",
            metavar="N|PATTERN=N",
            help="Reflections (even), rank of the sum (default 8); repeatable.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            "--energy",
            metavar="F",
            help="Instead: share of each layer's squared change that is to be kept.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            metavar="N",
            rich_help_panel=METHOD,
            help="Layers at a time (default: processors); the result does not depend on it.",
        ),
    ] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--targets",
            metavar="PATTERN|PRESET",
            autocompletion=presets,
            rich_help_panel=TARGETS,
            help="Default: every Linear and convolution that differs.",
        ),
    ] = None,
    exclude: ExcludeOption = None,
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
    """Extract an adapter from a fine-tuned checkpoint: what it learned, in a few megabytes.

    Example: ortho extract v1-5.safetensors my-tuned.safetensors -o my-adapter --kind both --rank 16

    The report says what share of each layer's change the rotation and the low rank explain.
    """
    values = gather(ctx, "extract", _typed_rule_wins)
    required(values, USAGE, "base", "tuned", "output")
    from ortho_cli.cli.carry import carry

    base, tuned = values.pop("base"), values.pop("tuned")
    options = {**values, "exclude": values["exclude"] or [], "workers": workers, "force": force}

    def plan() -> object:
        from ortho_cli.checkpoints.store import open_checkpoint
        from ortho_cli.surgery.extract import plan_extract

        return plan_extract(open_checkpoint(base), open_checkpoint(tuned), **options)

    carry(ctx, plan)


def _typed_rule_wins(values: dict[str, Any], typed: set[str]) -> None:
    """How much to keep, on the command line, takes the place of what the recipe says of it."""
    if not typed.isdisjoint({"rank", "energy"}):
        values.update({name: None for name in ("rank", "energy") if name not in typed})
