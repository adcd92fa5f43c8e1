"""Safetensors files that lie: every way of facts 4.4 in which a header can be wrong, and those near it.

Each is (name, contents, pattern of the message). A reader must end in one CheckpointError whose message matches.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from typing import Any

Case = tuple[str, Callable[[], bytes], str]


def packed(header: str | bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """A file of this header, this data, and the length said to be the header's."""
    raw = json.dumps(header).encode() if isinstance(header, dict) else header
    raw = raw.encode() if isinstance(raw, str) else raw
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(shape: Any = (4,), begin: Any = 0, end: Any = 4, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


GOOD = packed({"a": entry(), "b": entry((2,), 4, 8, "F16")}, bytes(8))
ONE = '{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'


def _lengths() -> Iterator[Case]:
    yield "empty", lambda: b"", "only 0 bytes"
    yield "seven-bytes", lambda: GOOD[:7], "only 7 bytes"
    yield "length-0", lambda: packed("", bytes(8)), "not a JSON object"
    yield "length-1", lambda: packed("{", b""), "not valid JSON"
    yield "length-2-63", lambda: packed(ONE, bytes(4), 2**63), "over the limit"
    yield "length-2-64-1", lambda: packed(ONE, bytes(4), 2**64 - 1), "over the limit"
    yield "length-100MB-1", lambda: packed(ONE, bytes(4), 100_000_001), "header of 100,000,001 bytes is over"
    yield "length-100MB", lambda: packed(ONE, bytes(4), 100_000_000), "truncated"
    yield "length-over-file", lambda: packed(ONE, b"", len(ONE) + 1), "truncated"
    yield "length-cuts-header", lambda: packed(ONE, bytes(4), len(ONE) - 1), "not valid JSON"
    yield "length-eats-data", lambda: packed(ONE, b"    ", len(ONE) + 4), "truncated"
    yield "truncated", lambda: GOOD[:-1], "truncated"
    yield "no-data", lambda: packed(ONE), "truncated"
    yield "trailing", lambda: GOOD + b"\0", "trailing bytes"
    yield "trailing-without-tensors", lambda: packed("{}", b"\0"), "trailing bytes"


def _json() -> Iterator[Case]:
    broken = "not valid JSON"
    yield "list", lambda: packed("[]"), "not a JSON object"
    yield "text", lambda: packed('"{}"'), "not a JSON object"
    yield "null", lambda: packed("null"), "not a JSON object"
    yield "bom", lambda: packed(b"\xef\xbb\xbf" + ONE.encode(), bytes(4)), "not a JSON object"
    yield "utf-16", lambda: packed(ONE.encode("utf-16-le"), bytes(4)), broken
    yield "not-utf-8", lambda: packed(ONE.encode().replace(b"a", b"\xff"), bytes(4)), broken
    yield "nul-padding", lambda: packed(ONE + "\0\0", bytes(4)), broken
    yield "trailing-json", lambda: packed(ONE + "{}", bytes(4)), broken
    yield "comment", lambda: packed(ONE[:-1] + "/**/}", bytes(4)), broken
    yield "single-quotes", lambda: packed(ONE.replace('"', "'"), bytes(4)), broken
    yield "raw-newline-in-name", lambda: packed(ONE.replace("a", "a\n", 1), bytes(4)), broken
    yield "lone-surrogate-name", lambda: packed(ONE.replace("a", "\\ud800", 1), bytes(4)), broken
    yield "lone-surrogate-value", lambda: packed('{"__metadata__":{"a":"\\udfff"}}'), broken
    yield "deep-list", lambda: packed('{"a":' + "[" * 500_000 + "]" * 500_000 + "}"), "too deeply"
    yield "deep-object", lambda: packed('{"a":' * 500_000 + "1" + "}" * 500_000), "more than the limit|too deeply"
    yield "bomb-of-lists", lambda: packed('{"a":[' + "[]," * 1_500_000 + "[]]}"), "more than the limit"
    yield "bomb-of-tensors", lambda: packed(_many(400_001), b""), "more than the limit"
    yield "digits", lambda: packed(ONE.replace("4", "9" * 100_000), bytes(4)), broken
    yield "nan", lambda: packed(ONE.replace("[4]", "[NaN]"), bytes(4)), broken
    yield "infinity", lambda: packed(ONE.replace("[4]", "[Infinity]"), bytes(4)), broken


def _many(count: int) -> str:
    return "{" + ",".join(f'"{n}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for n in range(count)) + "}"


def _keys() -> Iterator[Case]:
    field = '"dtype":"U8","shape":[4],"data_offsets":[0,4]'
    other = field.replace("[0,4]", "[4,8]")
    yield "key-twice-same-range", lambda: packed(f'{{"a":{{{field}}},"a":{{{field}}}}}', bytes(4)), "'a' appears twice"
    yield "key-twice-other-range", lambda: packed(f'{{"a":{{{field}}},"a":{{{other}}}}}', bytes(8)), "'a' appears twice"
    yield "key-twice-escaped", lambda: packed(f'{{"a":{{{field}}},"\\u0061":{{{field}}}}}', bytes(4)), "appears twice"
    yield "field-twice", lambda: packed(f'{{"a":{{{field},"shape":[4]}}}}', bytes(4)), "'shape' appears twice"
    yield "metadata-twice", lambda: packed('{"__metadata__":{},"__metadata__":{}}'), "appears twice"
    yield "metadata-key-twice", lambda: packed('{"__metadata__":{"x":"1","x":"2"}}'), "appears twice"
    for name, value in {"list": [], "number": 1, "null": None, "tensor": entry()}.items():
        yield f"metadata-{name}", lambda value=value: packed({"__metadata__": value}, bytes(4)), "not a map from text"
    for name, value in {"number": 1, "null": None, "nested": {}, "list": ["a"], "bool": True}.items():
        yield (
            f"metadata-value-{name}",
            lambda value=value: packed({"__metadata__": {"x": value}}),
            "not a map from text",
        )
    shown = {"escape": r"\\u001b\[31m", "title": r"\\u001b\]0;x\\u0007", "newline": r"\\u000a", "rtl": r"\\u202e"}
    for name, char in {"escape": "\x1b[31m", "title": "\x1b]0;x\7", "newline": "\n", "rtl": "\u202e"}.items():
        yield f"name-{name}", lambda char=char: packed({f"a{char}b": entry()}, bytes(4)), f"'a{shown[name]}b' has char"
    yield "name-nul", lambda: packed({"a\0": entry()}, bytes(4)), "cannot be printed"
    yield "name-endless", lambda: packed({"\x1b" + "x" * 100_000: entry()}, bytes(4)), r"xxx\.\.\.'"


def _fields() -> Iterator[Case]:
    for name, value in {"list": [], "text": "U8", "null": None, "sequence": ["U8", [4], [0, 4]]}.items():
        yield f"tensor-{name}", lambda value=value: packed({"a": value}, bytes(4)), "lacks dtype"
    for key in ("dtype", "shape", "data_offsets"):
        rest = {other: value for other, value in entry().items() if other != key}
        yield f"no-{key}", lambda rest=rest: packed({"a": rest}, bytes(4)), "lacks dtype"
    for name, value in {"unknown": "F33", "case": "u8", "number": 8, "list": ["U8"], "null": None, "empty": ""}.items():
        yield f"dtype-{name}", lambda value=value: packed({"a": entry(dtype=value)}, bytes(4)), "unknown dtype"
    yield "dtype-escape", lambda: packed({"a": entry(dtype="\x1b[2J")}, bytes(4)), r"unknown dtype '\\u001b\[2J'"
    shapes: dict[str, Any] = {
        "negative": [-4], "two-negatives": [-2, -2], "float": [4.0], "bool": [True, 4], "text": ["4"], "null": [None],
        "number": 4, "nested": [[4]], "dict": {"0": 4}, "17-dims": [1] * 16 + [4], "2-63": [2**63],
    }  # fmt: skip
    for name, value in shapes.items():
        yield f"shape-{name}", lambda value=value: packed({"a": entry(value)}, bytes(4)), "has the shape"
    yield "shape-exponent", lambda: packed(ONE.replace("[4]", "[4e0]"), bytes(4)), "has the shape"
    yield (
        "shape-negative-zero",
        lambda: packed(ONE.replace("[4]", "[-0]").replace("0,4", "0,0")),
        "-0 is no whole number",
    )
    offsets: dict[str, Any] = {
        "negative": [-4, 0], "float": [0.0, 4.0], "bool": [False, 4], "text": ["0", "4"], "one": [4],
        "three": [0, 4, 4], "number": 4, "null": None, "2-63": [0, 2**63],
    }  # fmt: skip
    for name, value in offsets.items():
        tensor = entry() | {"data_offsets": value}
        yield f"offsets-{name}", lambda tensor=tensor: packed({"a": tensor}, bytes(4)), "has the data_offsets"


def _ranges() -> Iterator[Case]:
    yield "end-before-begin", lambda: packed({"a": entry((4,), 4, 0)}, bytes(4)), "its range has -4"
    yield "shape-over-range", lambda: packed({"a": entry((5,))}, bytes(4)), "needs 5 bytes, its range has 4"
    yield "shape-under-range", lambda: packed({"a": entry((3,))}, bytes(4)), "needs 3 bytes, its range has 4"
    yield "dtype-over-range", lambda: packed({"a": entry((4,), dtype="F32")}, bytes(4)), "needs 16 bytes"
    yield "empty-shape-with-range", lambda: packed({"a": entry((0, 4))}, bytes(4)), "needs 0 bytes"
    yield "half-a-byte", lambda: packed({"a": entry((1,), 0, 1, "F4")}, bytes(1)), "needs 0.5 bytes"
    yield "half-a-byte-in-none", lambda: packed({"a": entry((1,), 0, 0, "F4")}), "needs 0.5 bytes"
    yield "overflow", lambda: packed({"a": entry((2**32, 2**32), 0, 0)}), "larger than any memory"
    yield "overflow-to-4", lambda: packed({"a": entry((2**62 + 1, 4))}, bytes(4)), "larger than any memory"
    yield "overflow-of-bits", lambda: packed({"a": entry((2**62,), 0, 0, "F64")}), "its range has 0"
    yield "overflow-then-zero", lambda: packed({"a": entry((2**62, 2**62, 0), 0, 0)}), "larger than any memory"
    yield "range-over-file", lambda: packed({"a": entry((2**40,), 0, 2**40)}, bytes(4)), "truncated"
    yield "alias", lambda: packed({"a": entry(), "b": entry()}, bytes(4)), "'b' overlaps"
    yield "alias-other-dtype", lambda: packed({"a": entry(), "b": entry((1,), 0, 4, "F32")}, bytes(4)), "overlaps"
    yield "overlap", lambda: packed({"a": entry(), "b": entry((4,), 2, 6)}, bytes(6)), "'b' overlaps"
    yield "inside", lambda: packed({"a": entry((8,), 0, 8), "b": entry((2,), 2, 4)}, bytes(8)), "'b' overlaps"
    yield "empty-inside", lambda: packed({"a": entry(), "b": entry((0,), 2, 2)}, bytes(4)), "'b' overlaps"
    yield "hole", lambda: packed({"a": entry(), "b": entry((4,), 8, 12)}, bytes(12)), "'b' leaves a hole"
    yield "hole-at-begin", lambda: packed({"a": entry((4,), 4, 8)}, bytes(8)), "'a' leaves a hole"
    yield "hole-before-empty", lambda: packed({"a": entry(), "b": entry((0,), 8, 8)}, bytes(8)), "'b' leaves a hole"


def all_attacks() -> list[Case]:
    """Every case, in a fixed order."""
    return [*_lengths(), *_json(), *_keys(), *_fields(), *_ranges()]
