"""`ortho generate`: make things with a run's model, or pictures with Stable Diffusion and adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ortho_cli.cli.arguments import recipe_keys
from ortho_cli.cli.completion import words
from ortho_cli.cli.options import METHOD, OUTPUT, DebugOption, DryRunOption, JsonOption, QuietOption, StrengthOption

__all__ = ["generate"]

ARGUMENTS = ("run", "output")  # the others are options of one maker or another
GANS = "Of a GAN"
HINTS = ("segm", "canny", "landmark", "depth", "sketch", "densepose")
SCHEDULERS = ("ddim", "ddpm", "pndm", "euler", "euler-a", "heun", "dpm++", "unipc", "deis")


def generate(
    ctx: typer.Context,
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN|BASE", help="A run's folder, or Stable Diffusion: an LDM file, a diffusers folder or a hub id."
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The folder to write; what is there is kept.", rich_help_panel=OUTPUT)
    ],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help="What to draw, or to answer; repeatable.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help="A prompt a line, or .jsonl: prompt, negative, control."),
    ] = None,
    control: Annotated[
        list[str] | None, typer.Option("--control", metavar="IMAGE", help="The hint to keep to; repeatable.")
    ] = None,
    control_type: Annotated[
        str | None,
        typer.Option(
            "--control-type",
            metavar="|".join(HINTS),
            help="What the hint is; canny finds the edges of a photograph.",
            autocompletion=words(*HINTS),
        ),
    ] = None,
    input: Annotated[
        Path | None, typer.Option("--input", metavar="FILE", help="To translate, or queries to answer: one a line.")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            "--split",
            metavar="val|train",
            help="Prompts and hints of a control run's own data.",
            autocompletion=words("val", "train"),
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option("--reference", metavar="DIR", help="With --split: also write the data's pictures there."),
    ] = None,
    num: Annotated[
        int | None,
        typer.Option(
            "--num", metavar="N", min=1, help="Pictures of each prompt (1); of a GAN (64), traversal rows (8)."
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", min=0, help="Of the first picture, or of all noise: 0.")
    ] = None,
    shard: Annotated[
        str | None, typer.Option("--shard", metavar="I/N", help="Only the I-th of N shares, counted from 0.")
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--checkpoint",
            metavar="best|last|STEP",
            help="Of a run; default: best, else last.",
            autocompletion=words("best", "last"),
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="PATH[=S]",
            help="HRA or LoRA of any dialect, at strength S; repeatable.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    strength: StrengthOption = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", metavar="N", min=1, help="Of denoising: 50; values of a traversal: 9.", rich_help_panel=METHOD
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            "--guidance",
            metavar="X",
            min=0,
            help="Of classifier-free guidance: 7.5; 1 is none.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            "--scheduler",
            metavar="NAME",
            help=f"Of diffusers: {', '.join(SCHEDULERS)}.",
            autocompletion=words(*SCHEDULERS),
            rich_help_panel=METHOD,
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option("--size", metavar="WxH", help="In pixels; default: the model's.", rich_help_panel=METHOD),
    ] = None,
    negative: Annotated[
        str | None,
        typer.Option("--negative", metavar="TEXT", help="What to keep away from.", rich_help_panel=METHOD),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option("--batch", metavar="N", min=1, help="Pictures at a time: 4.", rich_help_panel=METHOD),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision",
            metavar="fp32|fp16|bf16",
            help="Of a base; default: fp16, on a CPU fp32.",
            autocompletion=words("fp32", "fp16", "bf16"),
            rich_help_panel=METHOD,
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            metavar="FOLDER|ID",
            help="Where a bare file's tokenizer and configurations are; default: SD1.5's, from the hub's cache.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    traverse: Annotated[
        bool,
        typer.Option(
            "--traverse",
            help="A grid for each coordinate: rows are pictures, columns its values.",
            rich_help_panel=GANS,
        ),
    ] = False,
    pairs: Annotated[
        int | None,
        typer.Option(
            "--pairs",
            metavar="N",
            min=1,
            help="Pairs that differ in one coordinate, with labels.npy.",
            rich_help_panel=GANS,
        ),
    ] = None,
    extent: Annotated[
        float | None,
        typer.Option("--extent", metavar="X", help="Coordinates go from -X to X: 4.", rich_help_panel=GANS),
    ] = None,
    truncation: Annotated[
        float | None,
        typer.Option("--truncation", metavar="T", help="Scales the noise: 1, traversals 0.7.", rich_help_panel=GANS),
    ] = None,
    sefa: Annotated[
        bool,
        typer.Option("--sefa", help="Turn the code to the directions its weights stretch.", rich_help_panel=GANS),
    ] = False,
    video: Annotated[
        str | None,
        typer.Option(
            "--video",
            metavar="mp4|gif",
            help="With --traverse: a film of each coordinate too.",
            autocompletion=words("mp4", "gif"),
            rich_help_panel=GANS,
        ),
    ] = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Make pictures or translations with a run, or pictures with Stable Diffusion; what is there is skipped.

    Example: ortho generate v1-5-pruned.safetensors --adapter my-hra=0.8 --prompt "a photo of a cat" -o pictures

    Example: ortho generate runs/digits-eigengan --traverse -o traversals

    Example: ortho generate runs/catalogues-translator-dense --input messages.de -o messages

    Many GPUs: --shard 0/4 ... --shard 3/4, or accelerate launch -m ortho_cli generate ...
    """
    from ortho_cli.cli.progress import item_bar
    from ortho_cli.cli.show import console_out, print_json, show_notes, table
    from ortho_cli.training.generate import open_making
    from ortho_cli.training.processes import is_first, leave

    making = open_making(run, _typed(ctx))
    if dry_run:
        plan = {**making.planned(), "would write": str(output)}
        if as_json:
            print_json({"command": "generate", "dry_run": True, "inputs": [run], **plan})
        else:
            table(console_out(), None, list(plan.items()))
        return
    with item_bar("generate", hidden=quiet or as_json or not is_first()) as bar:
        try:
            found = making.make(output, bar)
        finally:
            leave()
    if not is_first():
        return
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
