"""A verb's arguments from a recipe and the command line together; what was typed wins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer

from ortho_cli.errors import OutputError, UsageError

__all__ = ["gather", "keep_recipe", "recipe_keys", "required"]

NOTHING: tuple[object, ...] = (None, [], ())  # what typer gives for an option that was not typed
SAVED = "ortho.recipe"  # where a command keeps its recipe until it has succeeded

# Options that say how to run and report, not what to do: they are no part of a recipe.
RUN_OPTIONS = {
    "recipe", "save_recipe", "force", "dry_run", "as_json", "verbose", "quiet", "debug", "push_to_hub", "private",
    "workers", "no_report", "cache", "no_cache",
}  # fmt: skip


def gather(
    ctx: typer.Context,
    verb: str,
    settle: Callable[[dict[str, Any], set[str]], None] = lambda values, typed: None,
) -> dict[str, Any]:
    """The verb's parameters: defaults, then the recipe's keys, then what was typed.

    Args:
        ctx: the running command.
        verb: the name in the recipe's ``verb:``; its keys are the long options.
        settle: takes out, given the names of those that were typed, what of the recipe contradicts them.

    Raises:
        RecipeError: the recipe does not fit its schema.
        OutputError: the recipe to save exists.
    """
    keys = recipe_keys(ctx.command)  # in their order; `ctx.params` has them as they were typed
    values = {name: None if ctx.params[name] in NOTHING else ctx.params[name] for name in keys}
    typed = {name for name in values if str(ctx.get_parameter_source(name)).endswith("COMMANDLINE")}
    source = ctx.params.get("recipe")
    if source:
        from ortho_cli.recipe.verbs import load_verb

        loaded = load_verb(source, verb)
        for name in values.keys() - typed:
            if keys[name] in loaded:
                values[name] = _from_recipe(keys[name], loaded[keys[name]])
    settle(values, typed)
    if ctx.params.get("save_recipe"):
        _check_recipe_file(Path(ctx.params["save_recipe"]))
        defaults = {parameter.name: parameter.default for parameter in ctx.command.params}
        ctx.meta[SAVED] = (
            verb,
            {
                keys[name]: _to_recipe(keys[name], value)
                for name, value in values.items()
                if value not in NOTHING and (name in typed or value != defaults.get(name))
            },
        )
    return values


def recipe_keys(command: Any) -> dict[str, str]:
    """The parameters of a verb that its recipes have -> their keys: the long option's name, or the argument's."""
    found = {}
    for parameter in command.params:
        option = next((word for word in parameter.opts if word.startswith("--")), str(parameter.name))
        if parameter.name not in RUN_OPTIONS | {"help"}:
            found[str(parameter.name)] = option.removeprefix("--").replace("-", "_")
    return found


def keep_recipe(ctx: typer.Context) -> None:
    """Write the recipe that `--save-recipe` asked for, once the command it repeats has succeeded."""
    if SAVED in ctx.meta:
        from ortho_cli.recipe.verbs import save_verb

        save_verb(ctx.params["save_recipe"], *ctx.meta[SAVED])


def _check_recipe_file(path: Path) -> None:
    """Refuse, before any work, a recipe that would overwrite something; `--force` is about the output, not this."""
    if path.suffix not in (".yaml", ".yml"):
        raise UsageError(f"--save-recipe {path} is not named like a recipe", hint=f"use {path.with_suffix('.yaml')}")
    if path.exists():
        raise OutputError(f"recipe file exists: {path}", hint="name another with --save-recipe")


def required(values: Mapping[str, Any], usage: str, *names: str) -> None:
    """Refuse a call that lacks a positional argument or the output.

    Raises:
        UsageError: with the usage line.
    """
    missing = [name for name in names if values.get(name) in NOTHING]
    if missing:
        shown = ", ".join("-o/--output" if name == "output" else name.upper() for name in missing)
        raise UsageError(f"missing: {shown}", hint=f"usage: {usage}")


def _from_recipe(key: str, value: Any) -> Any:
    if key == "adapters":
        return [(item["path"], item.get("strength", 1.0)) for item in value]
    if key in ("rank", "strength"):
        return [str(item) for item in value] if isinstance(value, list) else [str(value)]
    if key == "format":
        return ",".join(value)
    return Path(value) if key in ("output", "undo", "keep_undo") and value is not None else value


def _to_recipe(key: str, value: Any) -> Any:
    if key == "adapters":
        return [_adapter(item) for item in value]
    if key in ("rank", "strength"):
        several = [item if "=" in str(item) else _number(item, int if key == "rank" else float) for item in value]
        return several[0] if len(several) == 1 and not isinstance(several[0], str) else several
    if key == "format":
        return [word.strip() for word in value.split(",") if word.strip()]
    if isinstance(value, (list, tuple)):
        return [item if isinstance(item, int) else str(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _adapter(item: Any) -> dict[str, Any]:
    from ortho_cli.surgery.strengths import split_strength

    path, strength = split_strength(item)
    return {"path": str(path), **({"strength": strength} if strength != 1 else {})}


def _number(text: Any, kind: Callable[[str], Any]) -> Any:
    """A number as YAML has it; what is none is for the verb, or the recipe's schema, to refuse."""
    try:
        return kind(str(text))
    except ValueError:
        return str(text)
