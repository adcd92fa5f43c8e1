"""Pickle opcodes, torch archives and zip files put together by hand, so that a test can make each of them lie.

Fragments are bytes that push one value; `pickle_of` turns a fragment into a pickle.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import IO, Any

CANARY = "ortho-canary"
TOUCH = f"touch {CANARY}"
OPEN = f"open({CANARY!r}, 'w').close()"

Case = tuple[str, Callable[[], bytes], str]  # of an attack: name, contents, pattern of the message

PROTOCOL_4 = 4


class Payload:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    if abs(value) < 2**31:
        return b"I%d\n" % value
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return (b"\x8a" + bytes([len(raw)]) if len(raw) < 256 else b"\x8b" + struct.pack("<I", len(raw))) + raw


def several(*items: bytes) -> bytes:
    """A tuple."""
    return b"(" + b"".join(items) + b"t"


def numbers(*values: int) -> bytes:
    return several(*map(number, values))


def listed(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"l"


def mapping(*pairs: tuple[bytes, bytes] | tuple[str, bytes]) -> bytes:
    keys = ((text(key) if isinstance(key, str) else key, value) for key, value in pairs)
    return b"(" + b"".join(key + value for key, value in keys) + b"d"


def imported(module: str, name: str, protocol: int = 2) -> bytes:
    if protocol >= PROTOCOL_4:
        return text(module) + text(name) + b"\x93"
    return f"c{module}\n{name}\n".encode()


def called(module: str, name: str, *args: bytes, protocol: int = 2) -> bytes:
    return imported(module, name, protocol) + several(*args) + b"R"


def pickle_of(fragment: bytes, protocol: int = 2) -> bytes:
    return (b"\x80" + bytes([protocol]) if protocol >= 2 else b"") + fragment + b"."


def storage(key: bytes = text("0"), numel: int = 6, kind: str = "FloatStorage", *more: bytes) -> bytes:
    return several(text("storage"), imported("torch", kind), key, text("cpu"), number(numel), *more) + b"Q"


def storage_of(kind: bytes) -> bytes:
    """A storage whose class is whatever `kind` pushes."""
    return several(text("storage"), kind, text("0"), text("cpu"), number(6)) + b"Q"


HOOKS = called("collections", "OrderedDict")


def tensor(
    shape: bytes = numbers(2, 3),
    strides: bytes = numbers(3, 1),
    first: bytes = number(0),
    of: bytes = storage(),
    *more: bytes,
    rebuild: str = "_rebuild_tensor_v2",
) -> bytes:
    """The call that rebuilds a 2 x 3 float tensor from storage "0", unless told otherwise."""
    return called("torch._utils", rebuild, of, first, shape, strides, b"I00\n", HOOKS, *more)


SIX_FLOATS = struct.pack("<6f", *range(6))


@dataclass
class Member:
    """A zip member; the fields below `data` are the lies."""

    name: str | bytes
    data: bytes | int = b""  # a number: that many zero bytes, as a hole in the file
    flags: int = 0x800
    method: int = 0
    size: int | None = None
    packed: int | None = None
    header: int | None = None
    local_name: bytes | None = None
    local_size: int | None = None
    local_method: int = 0
    disk: int = 0
    descriptor: bool = False
    extra: bytes = b""


def write_zip(
    file: IO[bytes],
    members: list[Member],
    *,
    zip64: bool = False,
    count: int | None = None,
    comment: bytes = b"",
    shift: int = 0,
) -> None:
    """Write a zip archive as torch does (`zip64`: with every 32-bit field moved to the 64-bit records)."""
    entries = []
    start = file.tell()
    for member in members:
        at = file.tell() - start
        size = member.data if isinstance(member.data, int) else len(member.data)
        crc = 0 if isinstance(member.data, int) else zlib.crc32(member.data)
        name = member.name.encode() if isinstance(member.name, str) else member.name
        local_name = name if member.local_name is None else member.local_name
        flags = member.flags | (8 if member.descriptor else 0)
        shown = 0 if member.descriptor else size if member.local_size is None else member.local_size
        saturated = min(shown, 2**32 - 1)
        fields = (b"PK\3\4", 0, flags, member.local_method, 0, 0, crc, saturated, saturated, len(local_name), 4)
        file.write(struct.pack("<4sHHHHHIIIHH", *fields) + local_name + b"FB\0\0")
        if isinstance(member.data, int):
            file.seek(member.data, 1)
        else:
            file.write(member.data)
        if member.descriptor:
            file.write(b"PK\7\10" + struct.pack("<IQQ", crc, size, size))
        size = size if member.size is None else member.size
        packed = size if member.packed is None else member.packed
        header = at if member.header is None else member.header
        wide = b""
        if zip64 or max(size, packed, header) >= 2**32 - 1:
            wide = struct.pack("<HHQQQ", 1, 24, size, packed, header)
            size = packed = header = 2**32 - 1
        sizes = (0, 0, flags, member.method, 0, 0, crc, packed, size, len(name), len(wide + member.extra), 0)
        entries.append(struct.pack("<4sHHHHHHIIIHHH", b"PK\1\2", *sizes))
        entries[-1] += struct.pack("<HHII", member.disk, 0, 0, header) + name + wide + member.extra
    directory = file.tell() - start
    file.write(b"".join(entries))
    length, number_of = sum(map(len, entries)), len(members) if count is None else count
    short = (min(number_of, 0xFFFF), min(length, 2**32 - 1), min(directory + shift, 2**32 - 1))
    if zip64 or number_of >= 0xFFFF or directory >= 2**32 - 1:
        end64 = file.tell() - start
        wide_fields = (b"PK\6\6", 44, 0, 45, 0, 0, number_of, number_of, length, directory + shift)
        file.write(struct.pack("<4sQHHIIQQQQ", *wide_fields) + struct.pack("<4sIQI", b"PK\6\7", 0, end64, 1))
        short = (0xFFFF, 2**32 - 1, 2**32 - 1)
    end = (b"PK\5\6", 0, 0, short[0], short[0], short[1], short[2], len(comment))
    file.write(struct.pack("<4sHHHHIIH", *end) + comment)


def members(pickle: bytes, *more: Member, storage: bytes = SIX_FLOATS) -> list[Member]:
    """What torch puts in its archives, with one storage."""
    return [
        Member("archive/data.pkl", pickle),
        Member("archive/byteorder", b"little"),
        Member("archive/data/0", storage),
        Member("archive/version", b"3\n"),
        *more,
    ]


def zipped(entries: list[Member], **quirks: Any) -> bytes:
    file = BytesIO()
    write_zip(file, entries, **quirks)
    return file.getvalue()


def archive(fragment: bytes, protocol: int = 2, storage: bytes = SIX_FLOATS) -> bytes:
    """A torch archive whose object is the fragment's value."""
    return zipped(members(pickle_of(fragment, protocol), storage=storage))


def checkpoint(*entries: tuple[str, bytes] | tuple[bytes, bytes], beside: bytes = b"N", protocol: int = 2) -> bytes:
    """A torch archive with a tensor `w` and the entries in its state dict, and a value beside the state dict."""
    weights = mapping(("w", tensor()), *entries)
    return archive(mapping(("beside", beside), ("state_dict", weights)), protocol)


MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


def legacy(
    fragment: bytes,
    *,
    magic: int = MAGIC,
    protocol: int = PROTOCOL,
    little: bytes = b"I01\n",
    keys: bytes = listed(text("0")),
    numel: int = 6,
    data: bytes = SIX_FLOATS,
) -> bytes:
    """A file of torch's format of before 1.6."""
    parts = (number(magic), number(protocol), mapping(("little_endian", little)), fragment, keys)
    return b"".join(map(pickle_of, parts)) + struct.pack("<q", numel) + data
