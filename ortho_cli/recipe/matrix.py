"""The `matrix` of a recipe: every combination of some keys' values, each a recipe of its own in a folder of its own.

    matrix:
      train.seed: [0, 1, 2]
      methods.hra.penalty, methods.hra.gram_schmidt: [[0.0, false], [1e-3, false], [0.0, true]]

A key that names several fields, with commas, varies them together. Cells come in row-major order: the last key fastest.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ortho_cli.errors import RecipeError
from ortho_cli.recipe.overrides import MATRIX, located, matrix_paths, replaced
from ortho_cli.recipe.parse import Location
from ortho_cli.recipe.section import Rejection

__all__ = ["Cell", "cells", "matrix_problems", "short_keys"]

MAX_CELLS = 1000  # more is no experiment but a slip; each is checked before the first one runs
MAX_NAME = 120  # of the 255 bytes of a folder's name, so that a run can put suffixes to it
FIXED = ("version", MATRIX, "run.dir")  # what says which recipe this is and where its cells go


@dataclass(frozen=True)
class Cell:
    """One combination.

    Attributes:
        index: from 0, in order; `--cell INDEX`.
        name: of its folder below `run.dir`, e.g. `rank=4,seed=0`.
        overrides: the value of every field that varies, by its full key.
        choice: which value of each key of the matrix it took.
        data: the recipe's data with the overrides in place, its own `run.dir`, and no matrix.
    """

    index: int
    name: str
    overrides: dict[str, object]
    choice: tuple[int, ...]
    data: dict[str, object]


def cells(recipe_data: dict[str, object]) -> list[Cell]:
    """All combinations, the last key fastest; one cell, without a name, where there is no matrix.

    Args:
        recipe_data: a training recipe that its schema accepts, as plain data with only what it gives.

    >>> data = {"run": {"dir": "runs/a"}, "train": {"epochs": 1}, "matrix": {"train.seed": [0, 1], "data.batch": [64]}}
    >>> [(cell.name, cell.data["run"]["dir"]) for cell in cells(data)]
    [('seed=0,batch=64', 'runs/a/seed=0,batch=64'), ('seed=1,batch=64', 'runs/a/seed=1,batch=64')]
    """
    base: dict[str, Any] = {key: value for key, value in recipe_data.items() if key != MATRIX}
    matrix: Any = recipe_data.get(MATRIX)
    if not matrix:
        return [Cell(0, "", {}, (), base)]
    places = matrix_paths(recipe_data)
    short = short_keys([path for key in matrix for path in fields(key)])
    made: list[Cell] = []
    names: set[str] = set()
    for index, choice in enumerate(itertools.product(*(range(len(values)) for values in matrix.values()))):
        data, overrides = base, {}
        for (key, values), chosen in zip(matrix.items(), choice, strict=True):
            for path, location, value in zip(fields(key), places[key], together(key, values[chosen]), strict=True):
                overrides[path] = value
                data = replaced(data, location, value)
        name = ",".join(f"{short[path]}={_value_text(value)}" for path, value in overrides.items())
        if len(name) > MAX_NAME or name in names:
            name = f"{name[:MAX_NAME]},cell={index}"
        names.add(name)
        folder = f"{str(data['run']['dir']).rstrip('/')}/{name}"
        made.append(Cell(index, name, overrides, choice, replaced(data, ("run", "dir"), folder)))
    return made


def matrix_problems(data: dict[str, object]) -> Iterator[Rejection]:
    """What is wrong with a matrix, but for the values themselves, which the schema judges in each cell."""
    matrix: Any = data.get(MATRIX)
    if matrix is None:
        return
    seen: dict[Location, str] = {}
    for key, values in matrix.items():
        here: Location = (MATRIX, key)
        paths = fields(key)
        for path in paths:
            if any(f"{fixed}.".startswith(f"{path}.") for fixed in FIXED):
                yield here, f"{path} may not vary"
                continue
            try:
                location = located(data, path)
            except RecipeError as error:
                yield here, f"{path}: {error.message}" if len(paths) > 1 else error.message
                continue
            for other, name in seen.items():
                if location[: len(other)] == other or other[: len(location)] == location:
                    yield here, f"{path} is varied twice, also by {name}"
            seen[location] = path
        for index, value in enumerate(values):
            if len(paths) > 1 and not (isinstance(value, list) and len(value) == len(paths)):
                yield (*here, index), f"expected a list of {len(paths)} values, one for each of {key}"
        counted = Counter(json.dumps(value) for value in values)
        for text in (text for text, count in counted.items() if count > 1):
            yield here, f"{text} is given {counted[text]} times"
    total = math.prod(len(values) for values in matrix.values())
    if total > MAX_CELLS:
        yield (MATRIX,), f"makes {total} cells; at most {MAX_CELLS}"


def fields(key: str) -> list[str]:
    """The fields that a key of a matrix names."""
    return [path.strip() for path in key.split(",")]


def together(key: str, value: Any) -> list[Any]:
    """One value for each field of a key."""
    return value if "," in key else [value]


def short_keys(paths: list[str]) -> dict[str, str]:
    """The end of each path that no other ends with.

    >>> short_keys(["train.seed", "methods.hra.rank", "methods.lora.rank"])
    {'train.seed': 'seed', 'methods.hra.rank': 'hra.rank', 'methods.lora.rank': 'lora.rank'}
    """
    ends = {path: [".".join(path.split(".")[start:]) for start in range(path.count("."), -1, -1)] for path in paths}
    counted = Counter(end for path in set(paths) for end in ends[path])
    return {path: next((end for end in ends[path] if counted[end] == 1), path) for path in paths}


def _value_text(value: object) -> str:
    """A value as part of a folder's name.

    >>> [_value_text(value) for value in (1e-5, True, None, "a/b", [64, 64])]
    ['1e-5', 'true', 'null', 'a-b', '64-64']
    """
    if isinstance(value, dict):
        return "-".join(f"{key}-{_value_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "-".join(map(_value_text, value))
    text = re.sub(r"e([-+])0+(?=\d)", r"e\1", repr(value)) if isinstance(value, float) else str(value)
    if value is None or isinstance(value, bool):
        text = json.dumps(value)
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text)
