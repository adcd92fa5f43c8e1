"""Options that several verbs share, so that each is spelled and explained once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ortho_cli.cli.completion import presets, recipes, words

__all__ = [
    "FORMATS", "DebugOption", "DryRunOption", "ExcludeOption", "FailAboveOption", "FailBelowOption", "ForceOption",
    "FormatOption", "JsonOption", "LayersOption", "OutputOption", "PrivateOption", "PushOption", "QuietOption",
    "RecipeOption", "SaveRecipeOption", "ShardOption", "StrengthOption", "VerboseOption", "WorkersOption",
]  # fmt: skip

METHOD, TARGETS, OUTPUT = "Method", "Targets", "Output"

OutputOption = Annotated[
    Path | None,
    typer.Option("-o", "--output", help="What to write: NAME.safetensors or a folder.", rich_help_panel=OUTPUT),
]
LayersOption = Annotated[
    list[str] | None,
    typer.Option(
        "--targets",
        metavar="PATTERN|PRESET",
        autocompletion=presets,
        help="Globs or a preset; every layer by default.",
        rich_help_panel=TARGETS,
    ),
]
ExcludeOption = Annotated[
    list[str] | None,
    typer.Option("--exclude", metavar="PATTERN", help="Layers to leave out.", rich_help_panel=TARGETS),
]
WorkersOption = Annotated[int | None, typer.Option("--workers", metavar="N", help="Layers at a time.")]
FailAboveOption = Annotated[
    float | None, typer.Option("--fail-above", metavar="X", help="Exit 5 where a layer's --metric is above.")
]
FailBelowOption = Annotated[
    float | None, typer.Option("--fail-below", metavar="X", help="Exit 5 where a layer's --metric is below.")
]
FORMATS = "html,png,csv"
FormatOption = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="LIST",
        help="Of html, png, svg, pdf, csv, json, with commas.",
        autocompletion=words("html", "png", "svg", "pdf", "csv", "json", FORMATS),
        rich_help_panel=OUTPUT,
    ),
]
ForceOption = Annotated[
    bool, typer.Option("-f", "--force", help="Overwrite the output if it exists.", rich_help_panel=OUTPUT)
]
DryRunOption = Annotated[
    bool, typer.Option("-n", "--dry-run", help="Say what would be written, and stop.", rich_help_panel=OUTPUT)
]
ShardOption = Annotated[
    str | None,
    typer.Option("--max-shard-size", metavar="SIZE", help="Split the output anew, e.g. 5GB.", rich_help_panel=OUTPUT),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object instead of a table.", rich_help_panel=OUTPUT)
]
StrengthOption = Annotated[
    list[str] | None,
    typer.Option(
        "--strength",
        metavar="S|PATTERN=S",
        help="0 is the base, 1 the adapter as trained; of those that fit a layer the last counts, times ADAPTER=S.",
        rich_help_panel=METHOD,
    ),
]
VerboseOption = Annotated[bool, typer.Option("-v", "--verbose", help="List every layer.", rich_help_panel=OUTPUT)]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="No table, no progress bar.", rich_help_panel=OUTPUT)]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=OUTPUT)]
PushOption = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub", metavar="ORG/NAME", help="Upload the result to the Hugging Face hub.", rich_help_panel=OUTPUT
    ),
]
PrivateOption = Annotated[
    bool, typer.Option("--private", help="Make the hub repository private.", rich_help_panel=OUTPUT)
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="FILE",
        help="Take arguments from a recipe; options given here win.",
        autocompletion=recipes,
    ),
]
SaveRecipeOption = Annotated[
    Path | None,
    typer.Option("--save-recipe", metavar="FILE", help="Write the recipe that repeats this command."),
]
