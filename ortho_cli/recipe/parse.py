"""YAML text to plain data, plus the line of every key and value, so that any later complaint can name its place.

YAML 1.2 in spirit where PyYAML is YAML 1.1: `1e-4` is a number, only `true` and `false` are booleans, `on`, `12:30` and
dates stay text. What a recipe never needs is refused: tags (they name Python objects), anchors and aliases (they can
grow a page into gigabytes), several documents, deep nesting. Repeated keys, which PyYAML lets win silently, are errors.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import NamedTuple

import yaml

from ortho_cli.errors import RecipeError

__all__ = ["Location", "Place", "Positions", "Problem", "dotted", "parse_yaml", "plain_value", "refusal"]

Location = tuple[str | int, ...]
"""A way into the data, e.g. `("methods", 0, "rank")`."""

MAX_DEPTH = 32  # no schema nests deeper than 6; far below Python's recursion limit
MAX_DIGITS = 20  # no setting needs more than 64 bits, and `int` refuses thousands of digits in its own words
MAX_SHOWN = 40  # more errors than a screen holds help nobody

_CONSTANTS: dict[str, bool | float | None] = {
    "": None, "~": None, "null": None, "true": True, "false": False,
    ".inf": math.inf, "+.inf": math.inf, "-.inf": -math.inf, ".nan": math.nan,
}  # fmt: skip
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_QUOTE_STARS = "put a pattern that starts with * in quotes"
_UNSPEAKABLE = re.compile("[\0\ud800-\udfff]")  # no file name and no JSON text may hold these


class Place(NamedTuple):
    """The lines (from 1) of a key and of its value; a list item has one line for both.

    What the command line put there instead of the file has line 0 and its `source`, e.g. `--set train.seed`.
    """

    key: int
    value: int
    source: str = ""


class Problem(NamedTuple):
    """One thing wrong with a recipe: the line, the key as a user would write it, and the reason."""

    line: int
    key: str
    reason: str
    source: str = ""

    def text(self, name: str) -> str:
        """The problem as an error prints it, `file:line: key: reason`; from the command line `--set key: reason`."""
        place = self.source or f"{name}:{self.line}"
        return f"{place}: {self.key}: {self.reason}" if self.key else f"{place}: {self.reason}"


@dataclass
class Positions:
    """Where everything stood in the file, and what was already wrong while reading it."""

    places: dict[Location, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def place(self, location: Location) -> Place:
        """The place of a location, or of the nearest one around it that is in the file."""
        while location and location not in self.places:
            location = location[:-1]
        return self.places.get(location, Place(1, 1))

    def problem(self, location: Location, reason: str, *, at_key: bool = False) -> Problem:
        """What is wrong with the value (or, `at_key`, with the key) at a location."""
        place = self.place(location)
        named = place.source and location in self.places  # the source says the key already
        return Problem(place.key if at_key else place.value, "" if named else dotted(location), reason, place.source)

    def put(self, location: Location, place: Place) -> None:
        """Let a place stand for a location and for all that was below it."""
        self.places = {key: kept for key, kept in self.places.items() if key[: len(location)] != location}
        self.places[location] = place


def refusal(name: str, problems: list[Problem], hint: str | None = None) -> RecipeError:
    """One error for all problems of one file, in the order of its lines."""
    unique = sorted(dict.fromkeys(problems), key=lambda problem: problem.line)
    lines = [problem.text(name) for problem in unique]
    if len(lines) > MAX_SHOWN:
        lines[MAX_SHOWN:] = [f"... and {len(lines) - MAX_SHOWN} more"]
    return RecipeError("\n".join(lines), hint=hint, where=unique[0].source or f"{name}:{unique[0].line}")


def plain_value(text: str) -> str | int | float | bool | None:
    """What an unquoted word of a recipe means.

    Raises:
        ValueError: a number too long or too large to be meant.

    >>> [plain_value(word) for word in ("1e-4", ".5", "12:30", "on", "true", "~")]
    [0.0001, 0.5, '12:30', 'on', True, None]
    """
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INT.fullmatch(text):
        if len(text) > MAX_DIGITS:
            raise ValueError(f"a whole number of {len(text)} digits; put it in quotes if it is text")
        return int(text)
    if _FLOAT.fullmatch(text):
        number = float(text)
        if math.isinf(number):
            raise ValueError("too large for a number; write .inf, or put it in quotes if it is text")
        return number
    return text


def parse_yaml(text: str, name: str) -> tuple[dict[str, object], Positions]:
    """Read one YAML mapping and remember the line of everything in it.

    Problems that do not stop the reading (repeated keys, impossible values) are left in `positions.problems`, so that
    they can be reported together with what the schema finds; whoever does not check a schema must look there.

    Raises:
        RecipeError: not YAML, not one mapping, or one of the constructs that recipes refuse.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        reason = f"the character {chr(error.character)!r} may not stand in a recipe"  # a code point, for text input
        raise refusal(name, [Problem(line, "", reason)]) from None
    except yaml.MarkedYAMLError as error:
        raise refusal(name, [Problem(_line(error.problem_mark), "", _syntax(error))]) from None
    if not isinstance(node, yaml.MappingNode):
        found = "nothing" if node is None or node.value in ("", "~", "null") else "no mapping"
        line = 1 if node is None else _line(node.start_mark)
        raise refusal(name, [Problem(line, "", f"a recipe is a mapping `key: value`, this file holds {found}")])
    positions = Positions({(): Place(_line(node.start_mark), _line(node.start_mark))})
    data = _convert(node, (), positions)
    assert isinstance(data, dict)
    return data, positions


class _Loader(yaml.SafeLoader):
    """Composes nodes only: refuses what recipes refuse before it can cost anything; `_convert` gives the values."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            reason = "anchors (&name) and aliases (*name) are not used in recipes; " + _QUOTE_STARS
            raise yaml.composer.ComposerError(None, None, reason, event.start_mark)
        if getattr(event, "tag", None) is not None:
            reason = f"the tag {event.tag!r} is not used in recipes; put the value in quotes if it is text"
            raise yaml.composer.ComposerError(None, None, reason, event.start_mark)
        if self.depth >= MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"nested more than {MAX_DEPTH} deep", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _convert(node: yaml.Node, here: Location, positions: Positions) -> object:
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, here, positions)
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            there: Location = (*here, index)
            positions.places[there] = Place(_line(item.start_mark), _line(item.start_mark))
            items.append(_convert(item, there, positions))
        return items
    try:
        return _value(node)
    except ValueError as error:
        positions.problems.append(Problem(_line(node.start_mark), dotted(here), str(error)))
        return None


def _mapping(node: yaml.MappingNode, here: Location, positions: Positions) -> dict[str, object]:
    mapping: dict[str, object] = {}
    for key, value in node.value:
        line = _line(key.start_mark)
        text = key.value if isinstance(key, yaml.ScalarNode) else ""
        there = (*here, text)
        if not text or _UNSPEAKABLE.search(text):
            positions.problems.append(Problem(line, dotted(here), "a key must be a word"))
        elif text in mapping:
            first = positions.places[there].key
            positions.problems.append(Problem(line, dotted(there), f"repeated; it is already on line {first}"))
        else:
            scalar = isinstance(value, yaml.ScalarNode)
            positions.places[there] = Place(line, _line(value.start_mark) if scalar else line)
            mapping[text] = _convert(value, there, positions)
    return mapping


def _value(node: yaml.Node) -> object:
    if not isinstance(node, yaml.ScalarNode):
        return node.value
    text: str = node.value
    if _UNSPEAKABLE.search(text):
        raise ValueError("holds a character that no file name or text may hold (NUL or half a surrogate pair)")
    return text if node.style else plain_value(text)  # only unquoted scalars are anything but text


def _line(mark: yaml.Mark | None) -> int:
    return 1 if mark is None else mark.line + 1


def _syntax(error: yaml.MarkedYAMLError) -> str:
    """PyYAML's words, and what most often was meant."""
    reason = " ".join(part for part in (error.context, error.problem) if part)
    if "alias" in reason and "recipes" not in reason:
        return f"{reason}; {_QUOTE_STARS}"
    if "'\\t'" in reason:
        return f"{reason}; indent with spaces, not tabs"
    if "expected a single document" in reason:
        return "a second document (---) starts here; a recipe is one document"
    if "mapping values are not allowed here" in reason:
        return f"{reason}; put a value that holds ': ' in quotes, and indent lists alike"
    return reason


def dotted(location: Location) -> str:
    """A location as a user writes it, `methods.0.rank`; what a terminal might obey is escaped.

    >>> dotted(("methods", 0, "rank"))
    'methods.0.rank'
    """
    return ".".join(part if part.isprintable() else repr(part) for part in map(str, location))
