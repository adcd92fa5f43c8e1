"""`ortho recipe`: look at recipes, check them, get a schema for an editor, copy one to change it.

stdout is data and nothing else. pydantic and yaml are imported by the functions, so that `--help` stays quick.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ortho_cli.cli.completion import recipes
from ortho_cli.errors import OrthoError, OutputError

__all__ = ["app"]

app = typer.Typer(
    name="recipe",
    help="List, show, check and copy recipes.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="A shipped recipe's name, or a file.", autocompletion=recipes)
]


@app.command("list")
def list_recipes(as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False) -> None:
    """List the shipped recipes: name, what each is for, its command."""
    from ortho_cli.recipe.catalog import command_of, load_any
    from ortho_cli.recipe.shipped import purpose, shipped

    rows = [
        {
            "name": name,
            "purpose": purpose(path),
            "command": command_of(load_any(str(path)), name),
            "path": str(path),
        }
        for name, path in shipped().items()
    ]
    if as_json:
        from ortho_cli.cli.show import print_json

        print_json({"command": "recipe list", "recipes": rows})
        return
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        typer.echo(f"{row['name']:{width}}  {row['purpose']}\n{'':{width}}  {row['command']}")


@app.command()
def show(name: Name) -> None:
    """Print a recipe as YAML with every default filled in."""
    from ortho_cli.recipe.catalog import load_any, shown

    typer.echo(shown(load_any(name)), nl=False)


@app.command()
def check(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Recipe files or names.", autocompletion=recipes)
    ],
    data: Annotated[
        bool, typer.Option("--data", help="Also look for the training data, and say how to get it.")
    ] = False,
) -> None:
    """Check recipes: all errors of all files at once, exit code 3."""
    from ortho_cli.recipe.catalog import load_any

    refused: list[OrthoError] = []
    for file in files:
        try:
            recipe = load_any(file)
            if data:
                _check_data(recipe)
        except OrthoError as error:
            refused.append(error)
        else:
            typer.echo(f"ok: {file}")
    if refused:
        hints = dict.fromkeys(error.hint for error in refused if error.hint)
        message = "\n".join(error.message for error in refused)
        raise type(refused[0])(message, hint="\n".join(hints) or None, where=refused[0].where)


def _check_data(recipe: object) -> None:
    """Say what data a training recipe needs and how to get it, then look for it; other recipes need none.

    Raises:
        OrthoError: the data is missing, or not what the recipe says.
    """
    section = getattr(recipe, "data", None)
    if section is None:
        return
    from ortho_cli.tasks.data_check import check_data, describe_data, found_text

    typer.echo(describe_data(section))  # first: it helps most where the data is missing
    typer.echo(found_text(section, check_data(section)))


@app.command()
def schema(
    verb: Annotated[str | None, typer.Option("--verb", help="Only this verb's recipes, e.g. train.")] = None,
) -> None:
    """Print the JSON Schema of recipes, for editors."""
    from ortho_cli.recipe.catalog import any_schema

    typer.echo(json.dumps(any_schema(verb), indent=2))


@app.command()
def copy(
    name: Name,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A file, or a folder to put it in.", show_default="./NAME.yaml"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace an existing file.")] = False,
) -> None:
    """Copy a recipe, comments and all, to change it."""
    from ortho_cli.recipe.shipped import find
    from ortho_cli.recipe.write import write_recipe

    source = find(name)
    target = output or Path(source.name)
    if target.is_dir():
        target /= source.name
    if target.exists() and target.samefile(source):
        raise OutputError("is the recipe itself", hint="name another file with -o", where=str(target))
    typer.echo(write_recipe(target, source.read_bytes(), force=force))
