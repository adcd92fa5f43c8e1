"""Regular expressions from a stranger's configuration: taken where matching them is cheap, refused where it may not be.

PEFT matches the keys of `rank_pattern` and `alpha_pattern` as regular expressions, and Python's engine goes through
every way a text can be split among the repeats: `(a|aa)+$` on forty letters takes hours. Nothing is matched here
before the number of those ways is known to be small.
"""

from __future__ import annotations

import re
from functools import lru_cache
from math import factorial

from ortho_cli.checkpoints.header import printable
from ortho_cli.errors import CheckpointError

__all__ = ["compiled", "is_plain", "names_end"]

MAX_PATTERN, MAX_NAME = 500, 512  # characters
MAX_WAYS = 200_000  # a few milliseconds of matching
_PLAIN = re.compile(r"[\w.-]+")
# One character or a class of them, an anchor; a group's parts; a repeat. Look-around, references and flags are none.
_TOKEN = re.compile(
    r"(?P<one>\\[.\-_/wWdD]|\[\^?[\w.-]+\]|[\w.\-/^$])|(?P<open>\((?:\?:)?)|(?P<close>\))|(?P<or>\|)"
    r"|(?P<any>[*+]|\{\d{1,3},\})|(?P<some>\?|\{(?P<least>\d{1,3})(?:,(?P<most>\d{1,3}))?\})"
)


def is_plain(pattern: str) -> bool:
    """Whether a key is a layer's name, as nearly all are: as a regular expression only its dots are special."""
    return _PLAIN.fullmatch(pattern) is not None


def names_end(layer: str, name: str) -> bool:
    """Whether a plain key is a layer's name or its end after a dot; a dot of the key stands for any character.

    >>> names_end("blocks.0.attn.to_q", "attn.to_q"), names_end("blocks.0.attn.to_q", "o_q")
    (True, False)
    """
    before = len(layer) - len(name)
    if before < 0 or (before and layer[before - 1] != "."):
        return False
    return all(ours in (theirs, ".") for ours, theirs in zip(name, layer[before:], strict=True))


def compiled(pattern: str, key: str, layer: str, where: str) -> re.Pattern[str]:
    """A key as PEFT matches it: the layer's name, or its end after a dot.

    Args:
        pattern: the key.
        key: the field it is in, for errors.
        layer: the name it is about to be matched with; the longer, the fewer repeats are taken.
        where: the file, for errors.

    Raises:
        CheckpointError: no regular expression, one with parts that are not read (look-around, a repeated group), or
            one that could split the name in too many ways.
    """
    shown = printable(pattern[:80])
    if len(pattern) > MAX_PATTERN or len(layer) > MAX_NAME:
        raise CheckpointError(f"{key}: {shown!r} or the layer's name is too long to be matched", where=where)
    choices = _choices(pattern)
    if choices is None:
        raise CheckpointError(
            f"{key}: {shown!r} is no regular expression of the simple kind that is read",
            hint="write layer names, or patterns without repeated groups: blocks.*attn.(to_q|to_k)",
            where=where,
        )
    ways, repeats = choices
    if ways * len(layer) ** repeats > MAX_WAYS * factorial(repeats):
        raise CheckpointError(
            f"{key}: {shown!r} could match {printable(layer[:80])!r} in too many ways",
            hint="write layer names, or fewer repeats and alternatives",
            where=where,
        )
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        raise CheckpointError(f"{key}: {shown!r} is no regular expression", where=where) from error


@lru_cache(maxsize=256)
def _choices(pattern: str) -> tuple[int, int] | None:
    """Ways through the alternatives and bounded repeats, and the number of unbounded ones; None where not readable."""
    ways, repeats, place = 1, 0, 0
    alternatives = [1]  # of each group that is open, the whole pattern first
    last = ""
    while place < len(pattern):
        token = _TOKEN.match(pattern, place)
        if token is None:
            return None
        place, kind = token.end(), str(token.lastgroup)
        if kind in ("any", "some"):
            lazy = token[0] == "?" and last in ("any", "some")
            if last != "one" and not lazy:
                return None
            if lazy:
                kind = "lazy"
            elif kind == "any":
                repeats += 1
            else:
                least, most = token["least"], token["most"]
                ways *= 2 if least is None else max(1, int(most or least) - int(least) + 1)
        elif kind == "open":
            alternatives.append(1)
        elif kind == "or":
            alternatives[-1] += 1
        elif kind == "close":
            ways *= alternatives.pop()
            if not alternatives:
                return None  # it would close the group that PEFT puts around the key
        last = kind
    return (ways * alternatives[0], repeats) if len(alternatives) == 1 else None
