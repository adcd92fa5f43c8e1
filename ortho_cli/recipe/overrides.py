"""Single keys of a recipe changed from outside: `--set methods.hra.rank=16`, and the keys of a matrix.

A key is written with dots; a method is named (`methods.hra.rank`) or counted (`methods.0.rank`). Whether a key exists
is the schema's to say: what is set here is checked like the file, and refused with `--set KEY` in place of a line.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ortho_cli.errors import RecipeError
from ortho_cli.recipe.explain import listed, nearest
from ortho_cli.recipe.parse import Location, Place, Positions, Problem, dotted, parse_yaml, plain_value, refusal

__all__ = ["apply_sets", "located", "matrix_paths", "replaced", "value_of"]

LISTS = {"methods"}  # a list even where the recipe does not have the key yet
MATRIX = "matrix"  # its keys hold dots themselves
FLOW = ("[", "{", '"', "'")  # what begins a value that is more than a word


def apply_sets(data: dict[str, object], positions: Positions, sets: Iterable[str]) -> dict[str, object]:
    """Change a recipe's data by `KEY=VALUE` texts, in their order.

    Args:
        data: as parsed; not changed.
        positions: gets a place for what is set, so that the schema's complaints name it.
        sets: e.g. `["train.seed=1", "methods.hra.rank=16", "model.hidden=[32, 32]"]`.

    Raises:
        RecipeError: no `=`, a key that leads nowhere or that the matrix varies, a value that is no YAML.

    >>> apply_sets({"methods": [{"name": "hra"}]}, Positions(), ["methods.hra.rank=16"])
    {'methods': [{'name': 'hra', 'rank': 16}]}
    """
    problems: list[Problem] = []
    changed: list[tuple[Location, Place]] = []
    for text in sets:
        path, equals, value = text.partition("=")
        path = path.strip()
        place = Place(0, 0, f"--set {path}")
        try:
            if not equals:
                raise RecipeError("expected KEY=VALUE, found no '='")
            location = located(data, path)
            data = replaced(data, location, value_of(value))
        except RecipeError as error:
            problems.append(Problem(0, "", error.message, place.source))
            continue
        for depth in range(1, len(location)):  # sections that had to be made on the way
            if location[:depth] not in positions.places:
                positions.put(location[:depth], place)
        positions.put(location, place)
        changed.append((location, place))
    varied = {location for paths in matrix_paths(data).values() for location in paths}
    for location, place in changed:
        if any(location[: len(other)] == other for other in varied):
            reason = "the recipe's matrix varies it; choose a cell, or change the matrix: --set 'matrix.KEY=[VALUE]'"
            problems.append(Problem(0, "", reason, place.source))
    if problems:
        raise refusal("--set", problems)
    return data


def located(data: dict[str, object], path: str) -> Location:
    """The place that a dotted key means; its last part need not exist yet.

    Raises:
        RecipeError: it leads nowhere, or to several methods at once.

    >>> located({"methods": [{"name": "gor"}, {"name": "hra"}]}, "methods.hra.rank")
    ('methods', 1, 'rank')
    """
    parts = path.split(".")
    if not all(parts):
        raise RecipeError("a key is words with dots between them, e.g. train.seed")
    if parts[0] == MATRIX and len(parts) > 1:
        return (MATRIX, ".".join(parts[1:]))
    here: Location = ()
    node: Any = data
    for part in parts:
        if isinstance(node, list):
            index = _index(node, part, dotted(here))
            here, node = (*here, index), node[index]
        elif isinstance(node, dict):
            here, node = (*here, part), node.get(part)
            node = ([] if part in LISTS else {}) if node is None else node
        else:
            raise RecipeError(f"{dotted(here)} is {node!r} and has no keys below it")
    return here


def replaced(data: Any, location: Location, value: object) -> Any:
    """A copy of the data with one value changed; sections that are missing on the way are made."""
    if not location:
        return value
    head, rest = location[0], location[1:]
    if isinstance(head, int):
        return [replaced(item, rest, value) if index == head else item for index, item in enumerate(data)]
    data = data or {}
    return {**data, head: replaced(data.get(head), rest, value)}


def matrix_paths(data: dict[str, object]) -> dict[str, list[Location]]:
    """The places that each key of the data's matrix varies (`a, b` varies two together); keys that lead nowhere not."""
    matrix = data.get(MATRIX)
    found: dict[str, list[Location]] = {}
    for key in matrix if isinstance(matrix, dict) else ():
        try:
            found[key] = [located(data, path.strip()) for path in key.split(",")]
        except RecipeError:
            continue
    return found


def value_of(text: str) -> object:
    """A value as typed after `=`: a word as in a recipe, or a list, a mapping or quoted text in YAML's flow style.

    Raises:
        RecipeError: brackets or quotes that do not close, a number that is too long.

    >>> [value_of(text) for text in ("1e-4", "null", "[a, 2]", "{name: sgd, lr: 0.1}", "'8'")]
    [0.0001, None, ['a', 2], {'name': 'sgd', 'lr': 0.1}, '8']
    """
    text = text.strip()
    try:
        if not text.startswith(FLOW):
            return plain_value(text)
        data, positions = parse_yaml(f"value: {text}", "")
    except ValueError as error:
        raise RecipeError(str(error)) from None
    except RecipeError as error:
        raise RecipeError(f"{text!r} is not a value: {error.message.partition(': ')[2]}") from None
    if positions.problems or list(data) != ["value"]:
        reason = positions.problems[0].reason if positions.problems else "it is more than one"
        raise RecipeError(f"{text!r} is not a value: {reason}")
    return data["value"]


def _index(items: list[Any], part: str, where: str) -> int:
    """The item that a number or a name means."""
    if part.isdecimal():
        if int(part) < len(items):
            return int(part)
        raise RecipeError(f"there is no {where}.{part}; the recipe has {len(items)}")
    names = [str(item["name"]) for item in items if isinstance(item, dict) and "name" in item]
    found = [index for index, item in enumerate(items) if isinstance(item, dict) and item.get("name") == part]
    if len(found) > 1:
        ways = listed([f"{where}.{index}" for index in found], "or")
        raise RecipeError(f"{len(found)} of {where} are named '{part}'; write {ways}")
    if not found:
        known = f"; it has {listed(names)}" if names else "; it is empty"
        raise RecipeError(f"nothing in {where} is named '{part}'{nearest(part, names) or known}")
    return found[0]
