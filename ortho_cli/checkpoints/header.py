"""A strict, bounded parser for safetensors headers.

The reference reader accepts names with any characters and the last of two equal keys; a surgeon must not. Everything
is checked against the file's size before a tensor is touched. Data may start at any byte (the official Stable
Diffusion files are misaligned); holes, overlaps, trailing bytes and repeated keys are refused.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ortho_cli.errors import CheckpointError
from .tensors import DTYPE_BITS, TensorInfo

__all__ = ["MAX_HEADER_BYTES", "Header", "parse_header", "printable", "read_header"]

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_TENSORS = 1_000_000  # a 300,000-tensor header parses in about a second; more is an attack, not a model
MAX_DIMS = 16
MAX_INT = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says of itself: tensors in the order of their bytes, and the metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Args:
        path: the file; only its first ``8 + header`` bytes are read.

    Raises:
        CheckpointError: the file breaks a rule of the format, or one of ours; the message names the tensor.

    >>> read_header(Path("pyproject.toml"))
    Traceback (most recent call last):
    ortho_cli.errors.CheckpointError: not a safetensors file: header of ... bytes is over the limit of 100,000,000
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            if len(start) < 8:
                _fail(path, f"not a safetensors file: only {size} bytes")
            length = int.from_bytes(start, "little")
            if length > MAX_HEADER_BYTES:
                _fail(path, f"not a safetensors file: header of {length:,} bytes is over the limit of 100,000,000")
            if length > size - 8:
                _fail(path, f"truncated: a header of {length:,} bytes in a file of {size:,}")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    return parse_header(raw, path, 8 + length, size)


def parse_header(raw: bytes, path: Path, data_start: int, size: int) -> Header:
    """Check the JSON header `raw` of a file of `size` bytes whose data begins at `data_start`."""
    if not raw.lstrip(b" ").startswith(b"{"):
        _fail(path, "not a safetensors file: the header is not a JSON object")
    try:
        fields = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except _RepeatedKeyError as error:
        _fail(path, f"key {printable(error.key)!r} appears twice in the header")
    except (ValueError, RecursionError) as error:
        _fail(path, f"header is not valid JSON: {str(error)[:120]}")
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _fail(path, "__metadata__ is not a map from text to text")
    if len(fields) > MAX_TENSORS:
        _fail(path, f"{len(fields):,} tensors are over the limit of {MAX_TENSORS:,}")
    entries = [_entry(path, name, field) for name, field in fields.items()]
    entries.sort(key=lambda entry: (entry[3], entry[4]))
    position = 0
    tensors: dict[str, TensorInfo] = {}
    for name, dtype, shape, begin, end in entries:
        if begin != position:
            kind = "overlaps the tensor before it" if begin < position else "leaves a hole before it"
            _fail(path, f"tensor {printable(name)!r} {kind}: it begins at byte {begin}, {position} was expected")
        position = end
        tensors[name] = TensorInfo(name, dtype, shape, path, data_start + begin)
    if data_start + position != size:
        kind = "truncated" if data_start + position > size else "has trailing bytes"
        _fail(path, f"{kind}: the header describes {data_start + position:,} bytes, the file has {size:,}")
    return Header(tensors, metadata, data_start)


def _entry(path: Path, name: str, field: Any) -> tuple[str, str, tuple[int, ...], int, int]:
    """One tensor's fields, each checked for its type and the range for its length."""
    shown = printable(name)
    if not isinstance(field, dict) or not {"dtype", "shape", "data_offsets"} <= field.keys():
        _fail(path, f"tensor {shown!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = field["dtype"], field["shape"], field["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        _fail(path, f"tensor {shown!r} has the unknown dtype {printable(str(dtype))!r}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(_is_size(size) for size in shape):
        _fail(path, f"tensor {shown!r} has the shape {printable(str(shape))[:80]}: sizes are whole numbers from 0")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        _fail(path, f"tensor {shown!r} has the data_offsets {printable(str(offsets))[:80]}")
    begin, end = offsets
    count = 1
    for size in shape:
        count *= size
    if count > MAX_INT:
        _fail(path, f"tensor {shown!r} has {len(str(count))}-digit many elements")
    bits = count * DTYPE_BITS[dtype]
    if bits % 8 or end - begin != bits // 8:
        _fail(path, f"tensor {shown!r} of {dtype} {tuple(shape)} needs {bits / 8:g} bytes, its range has {end - begin}")
    return name, dtype, tuple(shape), begin, end


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_INT


class _RepeatedKeyError(ValueError):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RepeatedKeyError(key)
            seen.add(key)
    return fields


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def printable(text: str) -> str:
    """`text` without control characters, escapes and direction marks, so that a name cannot paint a terminal."""
    return "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in text)


def _fail(path: Path, reason: str) -> NoReturn:
    raise CheckpointError(reason, where=str(path))
