"""A recipe file to an instance of its schema; everything that is wrong with it in one error, each with `file:line`.

The schema is any pydantic model: nothing here knows verbs, methods or tasks. pydantic says what is wrong where; this
module says it in a recipe's words, finds the line, and names the nearest key that exists.
"""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from ortho_cli.errors import RecipeError
from ortho_cli.recipe.explain import explain
from ortho_cli.recipe.parse import Positions, Problem, parse_yaml, refusal

__all__ = ["inspect", "load_yaml", "read_recipe", "validate"]

Model = TypeVar("Model", bound=BaseModel)

MAX_BYTES = 256 * 1024  # a recipe has a few KB; the worst text of this size takes seconds, not minutes


def load_yaml(path: str | PathLike[str]) -> tuple[dict[str, object], Positions]:
    """Read a recipe file as plain data, with the line of every key and value.

    Raises:
        RecipeError: unreadable, too large, not a YAML mapping, a repeated key, or a construct that recipes refuse.
    """
    data, positions = read_recipe(path)
    if positions.problems:
        raise refusal(str(path), positions.problems)
    return data, positions


def read_recipe(path: str | PathLike[str]) -> tuple[dict[str, object], Positions]:
    """As :func:`load_yaml`, but leaves repeated keys in `positions.problems` for :func:`validate` to report."""
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{path}: cannot read the recipe: {error.strerror}", where=str(path)) from None
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"{path}: larger than {MAX_BYTES // 1024} KiB: this is no recipe", where=str(path))
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise refusal(str(path), [Problem(line, "", f"not UTF-8 (byte 0x{raw[error.start]:02x})")]) from None
    return parse_yaml(text, str(path))


def validate(
    model_class: type[Model],
    data: dict[str, object],
    positions: Positions,
    path: str | PathLike[str],
    *,
    hint: str | None = None,
) -> Model:
    """Check a recipe's data against its schema.

    Types are strict, as JSON's are: `"8"`, `true` and `8.0` are no whole numbers. Lists become tuples where the schema
    has tuples. All errors are collected, those of :func:`read_recipe` too.

    Args:
        model_class: any pydantic model.
        data: as parsed; never changed.
        positions: the lines of `data`.
        path: the file's name, for messages.
        hint: what to type next if it is refused.

    Raises:
        RecipeError: one line for each problem, `file:line: key: reason; did you mean 'rank'?`.
    """
    instance, problems = inspect(model_class, data, positions)
    if instance is None:
        raise refusal(str(path), problems, hint)
    return instance


def inspect(
    model_class: type[Model], data: dict[str, object], positions: Positions
) -> tuple[Model | None, list[Problem]]:
    """As :func:`validate`, but gives the problems instead of raising them; the instance only where there are none."""
    problems = list(positions.problems)
    try:
        instance = model_class.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        # A value that could not be read has none to check.
        told = {(problem.line, problem.key) for problem in problems}
        found = explain(error.errors(include_url=False), model_class.model_json_schema(), data, positions)
        problems += [problem for problem in found if (problem.line, problem.key) not in told]
        return None, problems
    return (None if problems else instance), problems
