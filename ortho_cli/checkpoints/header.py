"""A strict, bounded parser for safetensors headers.

The reference reader accepts names with any characters and the last of two equal keys; a surgeon must not. Everything
is checked against the file's size before a tensor is touched. Data may start at any byte (the official Stable
Diffusion files are misaligned); holes, overlaps, trailing bytes, repeated keys and unprintable names are refused.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from ortho_cli.errors import CheckpointError

from .strict_json import RepeatedKeyError, parse_strict
from .tensors import DTYPE_BITS, Stamp, TensorInfo, stamp_of

__all__ = ["MAX_HEADER_BYTES", "Header", "parse_header", "printable", "quoted", "read_header"]

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_TENSORS = 400_000  # 300,000 take two seconds and 300 MB to parse; more is an attack, not a model
KEYS_PER_TENSOR = 5  # its name and three fields; the rest is for metadata, one key and its value an entry
ELEMENTS_PER_TENSOR = 12  # commas of a tensor with seven dimensions
MAX_DIMS = 16
MAX_INT = 2**63 - 1
MAX_SHOWN = 200  # characters of a name or value that an error message repeats


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

    >>> read_header(Path(__file__))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ortho_cli.errors.CheckpointError: not a safetensors file: header of ... bytes is over the limit of 100,000,000
    """
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            size = status.st_size
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
    return parse_header(raw, path, 8 + length, size, stamp_of(status))


def parse_header(raw: bytes, path: Path, data_start: int, size: int, stamp: Stamp | None = None) -> Header:
    """Check the JSON header `raw` of a file of `size` bytes whose data begins at `data_start`."""
    if not raw.lstrip(b" ").startswith(b"{"):
        _fail(path, "not a safetensors file: the header is not a JSON object")
    # Before they become objects and fill the memory: containers, keys (of metadata, too) and elements.
    for marks, most in ((b"{[", 3), (b":", KEYS_PER_TENSOR), (b",", ELEMENTS_PER_TENSOR)):
        if sum(raw.count(mark) for mark in marks) > most * MAX_TENSORS:
            _fail(path, f"header of {len(raw):,} bytes holds more than the limit of {MAX_TENSORS:,} tensors")
    try:
        fields = parse_strict(raw)
    except RepeatedKeyError as error:
        _fail(path, f"key {quoted(error.key)} appears twice in the header")
    except ValueError as error:
        _fail(path, f"header is not valid JSON: {str(error)[:120]}")
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _fail(path, "__metadata__ is not a map from text to text")
    entries = [_entry(path, name, field) for name, field in fields.items()]
    entries.sort(key=lambda entry: (entry[3], entry[4]))
    position = 0
    tensors: dict[str, TensorInfo] = {}
    for name, dtype, shape, begin, end in entries:
        if begin != position:
            kind = "overlaps the tensor before it" if begin < position else "leaves a hole before it"
            _fail(path, f"tensor {quoted(name)} {kind}: it begins at byte {begin}, {position} was expected")
        position = end
        tensors[name] = TensorInfo(name, dtype, shape, path, data_start + begin, stamp=stamp)
    if data_start + position != size:
        kind = "truncated" if data_start + position > size else "has trailing bytes"
        _fail(path, f"{kind}: the header describes {data_start + position:,} bytes, the file has {size:,}")
    return Header(tensors, metadata, data_start)


def _entry(path: Path, name: str, field: Any) -> tuple[str, str, tuple[int, ...], int, int]:
    """One tensor's fields, each checked for its type and the range for its length."""
    if not name.isprintable():
        _fail(path, f"tensor name {quoted(name)} has characters that cannot be printed")
    if not isinstance(field, dict) or not {"dtype", "shape", "data_offsets"} <= field.keys():
        _fail(path, f"tensor {quoted(name)} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = field["dtype"], field["shape"], field["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        _fail(path, f"tensor {quoted(name)} has the unknown dtype {quoted(dtype)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(_is_size(size) for size in shape):
        _fail(path, f"tensor {quoted(name)} has the shape {quoted(shape)}: sizes are whole numbers from 0")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        _fail(path, f"tensor {quoted(name)} has the data_offsets {quoted(offsets)}")
    begin, end = offsets
    count, largest = prod(shape), prod(size or 1 for size in shape)
    if largest > MAX_INT:  # an empty tensor's other sizes, too: their product would overflow in the reference reader
        _fail(path, f"tensor {quoted(name)} of shape {quoted(shape)} is larger than any memory")
    bits = count * DTYPE_BITS[dtype]
    if bits % 8 or end - begin != bits // 8:
        found = f"its range has {end - begin}"
        _fail(path, f"tensor {quoted(name)} of {dtype} {tuple(shape)} needs {bits / 8:g} bytes, {found}")
    return name, dtype, tuple(shape), begin, end


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_INT


def printable(text: str) -> str:
    """`text` without control characters, escapes and direction marks, so that a name cannot paint a terminal."""
    return "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in text)


def quoted(value: object) -> str:
    """A name or value as a message shows it: printable, quoted where it is text, and short."""
    text = printable(str(value)[: MAX_SHOWN + 1])
    text = text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."
    return f"'{text}'" if isinstance(value, str) else text


def _fail(path: Path, reason: str) -> NoReturn:
    raise CheckpointError(reason, where=str(path))
