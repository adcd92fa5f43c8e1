"""JSON from strangers, read strictly: no key twice, no numbers that JSON lacks, no text that no file can hold.

Python's own parser takes the last of two equal keys, `NaN`, `-0` as 0 and halves of characters; what it lets pass here
could mean one thing to us and another to the library that reads the same bytes.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

__all__ = ["RepeatedKeyError", "parse_strict"]

MAX_DIGITS = 20  # 2**64 has 20; longer numbers take quadratic time


class RepeatedKeyError(ValueError):
    """A JSON object names the same key twice."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def parse_strict(raw: bytes, *, any_number: bool = False) -> Any:
    """Parse UTF-8 JSON, or say what is wrong with it.

    Args:
        raw: the text.
        any_number: take `Infinity`, `NaN` and long numbers: libraries write them into their configurations.

    Raises:
        RepeatedKeyError: a key appears twice in one object.
        ValueError: not JSON, nested too deeply, or with text or numbers that only Python would accept.

    >>> parse_strict(b'{"a": [1, 2]}')
    {'a': [1, 2]}
    >>> parse_strict(b'{"a": 1, "a": 1}')
    Traceback (most recent call last):
    ortho_cli.checkpoints.strict_json.RepeatedKeyError: a
    """
    try:
        numbers: dict[str, Any] = {} if any_number else {"parse_constant": _no_constant, "parse_int": _whole}
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, **numbers)
        if b"\\u" in raw:  # only an escape can spell half a character (a lone surrogate)
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise RepeatedKeyError(key)
            seen.add(key)
    return fields


def _whole(text: str) -> int:
    if text == "-0" or len(text) > MAX_DIGITS:
        raise ValueError(f"{text[:24]} is no whole number of at most {MAX_DIGITS} digits")
    return int(text)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
