"""What pydantic says about a recipe, in a recipe's own words: one problem a place, its line, the nearest known key.

pydantic names a place by fields mixed with the names of union branches and tags; the walk here follows data and JSON
Schema together to tell them apart, so that any later schema is explained without a line of its own.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic_core import ErrorDetails

from ortho_cli.recipe.parse import Location, Positions, Problem, plain_value

__all__ = ["explain", "listed", "nearest"]

Schema = dict[str, Any]  # a node of a JSON Schema

# pydantic's complaints about the type of a value, as the thing it wanted.
WANTED = {
    "int_type": "a whole number", "int_from_float": "a whole number", "float_type": "a number",
    "finite_number": "a finite number", "bool_type": "true or false", "string_type": "text", "list_type": "a list",
    "tuple_type": "a list", "set_type": "a list", "dict_type": "a mapping", "model_type": "a mapping",
    "model_attributes_type": "a mapping", "none_required": "null",
}  # fmt: skip

# How YAML 1.1, Python and people spell booleans; recipes know `true` and `false` alone.
BOOLEANS = {"true": "true", "yes": "true", "on": "true", "false": "false", "no": "false", "off": "false"}


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'rank'?`, or nothing where no known word is near.

    >>> nearest("rnk", ["rank", "seed"])
    "; did you mean 'rank'?"
    """
    words = list(known)
    found = [other for other in words if other.lower() == word.lower()] or difflib.get_close_matches(word, words, n=1)
    return f"; did you mean '{found[0]}'?" if found else ""


def explain(errors: list[ErrorDetails], root: Schema, data: object, positions: Positions) -> list[Problem]:
    """Turn pydantic's errors into problems, at most one for each place.

    Args:
        errors: `ValidationError.errors()`.
        root: the JSON Schema of the model that refused.
        data: what it refused.
        positions: the lines of `data`.
    """
    found: dict[Location, list[tuple[ErrorDetails, list[Schema]]]] = {}
    for error in errors:
        loc = error["loc"]
        keyed = error["type"] in ("missing", "extra_forbidden")  # their last part is a key, even where data has none
        location, nodes = _trace(root, data, loc[:-1] if keyed else loc)
        found.setdefault((*location, loc[-1]) if keyed else location, []).append((error, nodes))

    outer = {location[:depth] for location in found for depth in range(len(location))}
    problems: list[tuple[Location, Problem]] = []
    suggested: set[Location] = set()
    for location, group in found.items():
        # A union reports every branch. Where one branch took the value and failed inside, the others are noise.
        if location in outer and all(error["type"] in WANTED for error, _ in group):
            continue
        error, nodes = group[0]
        if error["type"] == "extra_forbidden":
            known = dict.fromkeys(key for node in nodes for key in node.get("properties", ()))
            near = difflib.get_close_matches(str(location[-1]), known, n=1)
            suggested.update((*location[:-1], key) for key in near)
            reason = "no such key" + (f"; did you mean '{near[0]}'?" if near else f" here; known: {listed(known)}")
            problems.append((location, positions.problem(location, reason, at_key=True)))
        elif error["type"] == "missing":
            problems.append((location, positions.problem(location, "missing", at_key=True)))
        elif error["type"].startswith("union_tag"):
            problems.append((location, _tag_problem(error, location, nodes, positions)))
        else:
            problems.append((location, positions.problem(location, _reason(group, _value_at(data, location)))))
    missing = {location for location, group in found.items() if group[0][0]["type"] == "missing"}
    return [problem for location, problem in problems if location not in missing & suggested]


def _reason(group: list[tuple[ErrorDetails, list[Schema]]], value: object) -> str:
    """Why a value was refused: what the branches of its union wanted, what was found, and what was perhaps meant."""
    types, choices, sayings = [], [], []
    for error, nodes in group:
        kind = error["type"]
        if kind in WANTED:
            types.append(WANTED[kind])
        elif kind == "literal_error":
            choices += [word for node in nodes for word in node.get("enum", [node["const"]] if "const" in node else [])]
        elif kind in ("value_error", "assertion_error"):
            sayings.append(str(error["ctx"]["error"]))  # a validator's own words
        elif kind == "too_short":
            sayings.append(f"expected {error['ctx']['min_length']} or more of them, found {_show(value)}")
        else:
            sayings.append(f"{error['msg'].removeprefix('Input ')}, found {_show(value)}")
    wanted = [] if sayings else types  # a branch that looked further than the type speaks for all
    if choices and not sayings:
        wanted = [*wanted, listed(choices, "or")]
    if wanted:
        near = nearest(value, map(str, choices)) if isinstance(value, str) else ""
        either = " or ".join(dict.fromkeys(wanted))
        sayings.insert(0, f"expected {either}, found {_show(value)}{near or _slip(value, wanted)}")
    return "; ".join(dict.fromkeys(sayings))


def _tag_problem(error: ErrorDetails, here: Location, nodes: list[Schema], positions: Positions) -> Problem:
    """An entry of a tagged union (`name: ...`) whose tag is unknown or missing."""
    context = error["ctx"]
    tags = [tag for node in nodes for tag in node.get("discriminator", {}).get("mapping", ())]
    key = context["discriminator"].strip("'")
    if error["type"] == "union_tag_not_found":
        return positions.problem((*here, key), f"missing; one of {listed(tags)}", at_key=True)
    tag = str(context["tag"])
    return positions.problem((*here, key), f"{_show(tag)} is none of {listed(tags)}{nearest(tag, tags)}")


def _trace(root: Schema, data: object, loc: Iterable[str | int]) -> tuple[Location, list[Schema]]:
    """Follow pydantic's `loc` through the data and the schema, dropping the names of union branches it mixes in."""
    here: Location = ()
    nodes = _branches(root, root)
    for part in loc:
        if isinstance(data, dict):
            unions = [node["discriminator"] for node in nodes if "discriminator" in node]
            chosen = [
                u["mapping"][part] for u in unions if data.get(u["propertyName"]) == part and part in u["mapping"]
            ]
            if chosen:
                nodes = [node for ref in chosen for node in _branches({"$ref": ref}, root)]
                continue
            if part in data:
                inner = [node.get("properties", {}).get(part, node.get("additionalProperties")) for node in nodes]
                here, data = (*here, part), data[part]
                nodes = [node for schema in inner if isinstance(schema, dict) for node in _branches(schema, root)]
        elif isinstance(data, list) and isinstance(part, int):
            inner = [node.get("items") for node in nodes]
            here, data = (*here, part), data[part]
            nodes = [node for schema in inner if isinstance(schema, dict) for node in _branches(schema, root)]
    return here, nodes


def _branches(schema: Schema, root: Schema) -> list[Schema]:
    """A schema and all it may stand for: its reference, the branches of its unions."""
    parts = [*schema.get("anyOf", ()), *schema.get("oneOf", ()), *schema.get("allOf", ())]
    if "$ref" in schema:
        parts.append(root["$defs"][schema["$ref"].rpartition("/")[2]])
    return [schema, *(node for part in parts for node in _branches(part, root))]


def _value_at(data: Any, location: Location) -> object:
    for part in location:
        data = data[part]
    return data


def listed(words: Iterable[object], last: str = "") -> str:
    """Words for a message: `a, b, c`, or with `last="or"` `a, b or c`; the order is kept.

    >>> listed(["fp16", "bf16", "fp32"], "or")
    'fp16, bf16 or fp32'
    """
    *head, tail = map(str, words)
    if head and last:
        return f"{', '.join(head)} {last} {tail}"
    return ", ".join([*head, tail])


def _show(value: object) -> str:
    """A value as a recipe spells it."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    return "null" if value is None else str(value).lower()  # true, 8.0, inf


def _slip(value: object, wanted: list[str]) -> str:
    """What to change where quotes, brackets or another YAML's booleans are the likely slip."""
    if not isinstance(value, str):
        return " (put it in quotes)" if "text" in wanted and value is not None and not isinstance(value, list) else ""
    if "true or false" in wanted and value.lower() in BOOLEANS:
        return f" (write {BOOLEANS[value.lower()]} without quotes)"
    try:
        meant = type(plain_value(value))
    except ValueError:
        return ""
    if (meant is int and {"a number", "a whole number"} & set(wanted)) or (meant is float and "a number" in wanted):
        return " (remove the quotes)"
    return " (write a list: [item, ...])" if "a list" in wanted else ""
