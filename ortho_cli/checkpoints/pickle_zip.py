"""Where the records of a torch zip archive lie in the file, by a parser that believes nothing it can check.

torch stores its records uncompressed, so each is a byte range that can be read, or copied, without unpacking. `zipfile`
is not used: it forgives prepended data, repeated names and overlapping records, and keeps an object for each of however
many members a file claims to have.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import IO

from ortho_cli.errors import CheckpointError

__all__ = ["Record", "read_archive"]

# The largest public checkpoints have a few thousand tensors a file; training states three or four times that.
MAX_MEMBERS = 100_000
# 46 bytes and a name of about 30 for each.
MAX_DIRECTORY_BYTES = 16 * 2**20

_END = struct.Struct("<4sHHHHIIH")
_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_ENTRY = struct.Struct("<4sHHHHHHIIIHHHHHII")
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF  # "see the zip64 record"
_FLAG_DESCRIPTOR, _FLAG_UTF8 = 0x8, 0x800  # sizes follow the data; names are UTF-8
_STORED = 0


@dataclass(frozen=True, slots=True)
class Record:
    """The bytes of one member: absolute offset of the first, and their number."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class _Entry:
    name: bytes
    flags: int
    size: int
    header: int


def read_archive(file: IO[bytes], size: int) -> dict[str, Record]:
    """Read and check the directory of a torch zip archive of `size` bytes.

    Returns:
        The records by their name inside the archive's folder: `data.pkl`, `version`, `data/0`, ...

    Raises:
        CheckpointError: truncated or trailing bytes; compressed, encrypted or split members; names that repeat, are
            absolute or climb; members that overlap, leave the file or contradict their own header; more than
            100,000 members; not exactly one `data.pkl`; a TorchScript archive; big-endian data.

    Cost: three short reads, the directory, and one short read for each member.
    """
    directory, length, count = _find_directory(file, size)
    members: dict[str, Record] = {}
    end = 0
    for entry in sorted(_read_directory(file, directory, length, count), key=lambda entry: entry.header):
        name = _checked_name(entry.name)
        if name in members:
            raise CheckpointError(f"the archive has two members named {name!r}")
        if entry.header < end or entry.header >= directory or (entry.header and not members):
            raise CheckpointError(f"member {name!r} of the archive starts where it cannot: byte {entry.header:,}")
        members[name] = record = _read_local(file, entry)
        end = record.offset + record.size
        if end > directory:
            raise CheckpointError(f"member {name!r} of the archive runs into the directory")
    root = _root(members)
    order = members.get(root + "byteorder")
    if order is not None and _read(file, order.offset, min(order.size, 16)) != b"little":
        raise CheckpointError("the archive was written on a big-endian machine; only little-endian data can be read")
    return {name.removeprefix(root): record for name, record in members.items()}


def _root(members: dict[str, Record]) -> str:
    """The folder that all records of a checkpoint lie in."""
    pickles = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise CheckpointError(
            f"a torch archive has exactly one data.pkl; here: {', '.join(pickles[:3]) or 'none'}",
            hint="other zip files (npz, model packages) are no checkpoints; pass the weight file inside",
        )
    root = pickles[0].removesuffix("data.pkl")
    for name in members:
        if not name.startswith(root):
            raise CheckpointError(f"member {name!r} lies outside the archive's folder {root!r}")
    if root + "constants.pkl" in members:
        raise CheckpointError(
            "this is a TorchScript archive: it holds a program, not only weights",
            hint="on a machine you trust it on: torch.save(torch.jit.load(FILE).state_dict(), 'weights.pt')",
        )
    return root


def _find_directory(file: IO[bytes], size: int) -> tuple[int, int, int]:
    """Offset, bytes and number of entries of the central directory, which must end where the end records begin."""
    if size < _END.size:
        raise CheckpointError(f"a zip archive of {size} bytes is truncated")
    end_at = size - _END.size
    signature, disk, start_disk, here, count, length, offset, comment = _END.unpack(_read(file, end_at, _END.size))
    if signature != b"PK\5\6" or comment:
        raise CheckpointError(
            "the archive does not end with its directory: it is truncated, or has bytes after its end",
            hint="download or copy the file again and compare its size with the source",
        )
    if disk or start_disk or here != count:
        raise CheckpointError("the archive is split over several files")
    locator_at = end_at - _LOCATOR.size
    if locator_at >= 0 and _read(file, locator_at, 4) == b"PK\6\7":
        _, disk, end64_at, disks = _LOCATOR.unpack(_read(file, locator_at, _LOCATOR.size))
        if disk or disks > 1 or end64_at + _END64.size != locator_at:
            raise CheckpointError("the archive's zip64 locator points elsewhere than to its zip64 record")
        signature, record, _, _, disk, start_disk, here64, count64, length64, offset64 = _END64.unpack(
            _read(file, end64_at, _END64.size)
        )
        agree = all(
            short in (full, mask)
            for short, full, mask in (
                (count, count64, _FULL16),
                (length, length64, _FULL32),
                (offset, offset64, _FULL32),
            )
        )
        if signature != b"PK\6\6" or record != _END64.size - 12 or disk or start_disk or here64 != count64 or not agree:
            raise CheckpointError("the archive's zip64 record contradicts its directory")
        end_at, count, length, offset = end64_at, count64, length64, offset64
    if offset + length != end_at:
        raise CheckpointError("the archive's directory does not lie where its end says")
    if count > MAX_MEMBERS or length > MAX_DIRECTORY_BYTES:
        raise CheckpointError(f"the archive claims {count:,} members; at most {MAX_MEMBERS:,} are read")
    return offset, length, count


def _read_directory(file: IO[bytes], offset: int, length: int, count: int) -> list[_Entry]:
    data = _read(file, offset, length)
    entries: list[_Entry] = []
    at = 0
    while at < length and len(entries) < count:
        if length - at < _ENTRY.size:
            break
        fields = _ENTRY.unpack_from(data, at)
        signature, _, _, flags, method, _, _, _, packed, size, names, extras, comments, disk, _, _, header = fields
        at += _ENTRY.size
        name, extra = data[at : at + names], data[at + names : at + names + extras]
        at += names + extras + comments
        if signature != b"PK\1\2" or at > length or comments:
            break
        size, packed, header, disk = _widen(extra, size, packed, header, disk)
        if flags & ~(_FLAG_DESCRIPTOR | _FLAG_UTF8) or disk:
            raise CheckpointError(f"member {_show(name)} of the archive is encrypted, patched or on another disk")
        if method != _STORED or packed != size:
            raise CheckpointError(
                f"member {_show(name)} of the archive is compressed; torch never compresses what it saves",
                hint="where you trust the file: unpack it and pack it again with: zip -0 -D -r FILE FOLDER",
            )
        entries.append(_Entry(name, flags, size, header))
    if at != length or len(entries) != count:
        raise CheckpointError(f"the archive's directory is damaged: entry {len(entries)} of {count} cannot be read")
    return entries


def _widen(extra: bytes, size: int, packed: int, header: int, disk: int) -> list[int]:
    """The fields of a directory entry with the saturated ones taken from its zip64 extra."""
    values = [size, packed, header, disk]
    wide = b""
    while extra:
        kind, length = struct.unpack("<HH", extra[:4]) if len(extra) >= 4 else (0, _FULL16)
        if len(extra) < 4 + length or (kind == 1 and wide):
            raise CheckpointError("a member of the archive has a damaged extra field")
        if kind == 1:
            wide = extra[4 : 4 + length]
        extra = extra[4 + length :]
    for index, full in enumerate((_FULL32, _FULL32, _FULL32, _FULL16)):
        if values[index] == full:
            width = 4 if full == _FULL16 else 8
            if len(wide) < width:
                raise CheckpointError("a member of the archive lacks its zip64 size or offset")
            values[index] = int.from_bytes(wide[:width], "little")
            wide = wide[width:]
    return values


def _read_local(file: IO[bytes], entry: _Entry) -> Record:
    """The member's true data range: its own header may have another length than the directory's entry."""
    raw = _read(file, entry.header, _LOCAL.size + len(entry.name))
    signature, _, flags, method, _, _, _, packed, size, names, extras = _LOCAL.unpack_from(raw)
    deferred = flags & _FLAG_DESCRIPTOR and not size and not packed
    agree = size in (entry.size, _FULL32) and packed in (entry.size, _FULL32)
    if (
        signature != b"PK\3\4"
        or (flags, method, names) != (entry.flags, _STORED, len(entry.name))
        or raw[_LOCAL.size :] != entry.name
        or not (deferred or agree)
    ):
        raise CheckpointError(f"member {_show(entry.name)} of the archive contradicts its entry in the directory")
    return Record(entry.header + _LOCAL.size + names + extras, entry.size)


def _checked_name(raw: bytes) -> str:
    """The member's name, if it could be a relative path on any system."""
    name = raw.decode("utf-8", "replace")
    parts = name.split("/")
    if not name.isprintable() or "\ufffd" in name or any(c in name for c in "\\:") or {"", ".", ".."} & {*parts}:
        raise CheckpointError(f"the archive has a member named {_show(raw)}, which is no plain relative path")
    return name


def _read(file: IO[bytes], offset: int, size: int) -> bytes:
    file.seek(offset)
    data = file.read(size)
    if len(data) != size:
        raise CheckpointError(f"the archive ends inside a record at byte {offset:,}")
    return data


def _show(name: bytes) -> str:
    return ascii(name[:80].decode("utf-8", "replace"))
