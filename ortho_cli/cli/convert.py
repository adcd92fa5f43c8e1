"""`ortho convert`: adapters and checkpoints in other forms."""

from __future__ import annotations

from typing import Annotated

import typer

from ortho_cli.cli.arguments import gather, required
from ortho_cli.cli.completion import forms
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
    StrengthOption,
    VerboseOption,
)  # fmt: skip

__all__ = ["convert"]

USAGE = "ortho convert ADAPTER|CHECKPOINT -o OUT --to FORM, or ortho convert ADAPTER -o OUT --strength S"


def convert(
    ctx: typer.Context,
    input: Annotated[str | None, typer.Argument(metavar="ADAPTER|CHECKPOINT", help="File, folder or hub id.")] = None,
    output: OutputOption = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="FORM",
            autocompletion=forms,
            rich_help_panel=METHOD,
            help="Adapters: peft-hra, peft-lora, kohya-lora, diffusers-lora, hra-repo. "
            "Checkpoints: ldm, diffusers, base (take an adapter out), dense (multiply factors out), safetensors.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="BASE", help="Its base; HRA to LoRA needs it.", rich_help_panel=METHOD),
    ] = None,
    strength: StrengthOption = None,
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
    """Write an adapter or a checkpoint in another form; exact, or refused with the reason.

    Example: ortho convert my-hra-adapter --to kohya-lora --base v1-5.safetensors -o my-lora.safetensors
    """
    values = gather(ctx, "convert")
    required(values, USAGE, "input", "output", *(() if values["strength"] else ("to",)))
    from ortho_cli.cli.carry import carry

    def plan() -> object:
        from ortho_cli.surgery.convert import plan_convert

        return plan_convert(
            values["input"], values["output"], values["to"], base=values["base"], strength=values["strength"] or (),
            force_base=force,
        )  # fmt: skip

    carry(ctx, plan)
