"""Write safetensors files by streaming: unchanged tensors as byte ranges, computed ones as they are produced.

The header is known before any value is, so every tensor has its place at once: a thread copies the ranges (inside the
kernel where the system can) while the caller computes the rest. The file appears under its name only when complete.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from ortho_cli.errors import CheckpointError, OutputError

from .header import MAX_HEADER_BYTES, printable, read_header
from .reading import TensorReader, open_input, tensor_bytes
from .tensors import DTYPE_BITS, Stamp, TensorInfo

__all__ = ["Piece", "computed", "copied", "file_bytes", "file_order", "write_file"]

COPY_BYTES = 64 * 2**20  # one kernel copy call; small enough that progress moves and Ctrl-C is felt
BUFFER_BYTES = 4 * 2**20  # of a copy outside the kernel
WRITEBACK_BYTES = 2**20  # smaller ranges are left to the final fsync: a request of their own would slow the disk
# Different file systems, a system that lacks the call, or a sandbox that forbids it: the plain copy serves.
_NO_KERNEL_COPY = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF})
# The reference writer's order of types, widest first: what it wrote is copied in one piece, and stays aligned.
_ORDER = {dtype: place for place, dtype in enumerate(reversed(DTYPE_BITS))}
Buffers = Iterator[Any]  # anything with the buffer protocol, in order, together exactly the tensor's bytes


@dataclass(frozen=True)
class Piece:
    """One tensor of an output file: either a byte range of an input, or buffers produced when the file is written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: TensorInfo | None = None
    produce: Callable[[], Buffers] | None = field(default=None, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return (prod(self.shape) * DTYPE_BITS[self.dtype] + 7) // 8


def copied(info: TensorInfo, name: str | None = None, shape: tuple[int, ...] | None = None) -> Piece:
    """A tensor taken over byte for byte, perhaps under another name or (same bytes) another shape."""
    name, shape = name if name is not None else info.name, shape if shape is not None else info.shape
    assert prod(shape) == info.numel, (name, shape, info.shape)
    if info.strides is None:
        return Piece(name, info.dtype, shape, source=info)
    return Piece(name, info.dtype, shape, produce=lambda: _row_major(info))


def computed(name: str, dtype: str, shape: Sequence[int], produce: Callable[[], Buffers]) -> Piece:
    """A tensor whose bytes `produce()` yields, block by block, when the file is written."""
    return Piece(name, dtype, tuple(shape), produce=produce)


def _row_major(info: TensorInfo) -> Buffers:
    """The bytes of a strided (pickled, transposed) tensor in row-major order."""
    with TensorReader() as reader:
        yield tensor_bytes(reader.read(info))


def file_order(pieces: Iterable[Piece]) -> list[Piece]:
    """The order in which tensors stand in a file, and computed ones are produced: the reference writer's."""
    return sorted(pieces, key=lambda piece: (_ORDER[piece.dtype], piece.name))


def _layout(
    pieces: Iterable[Piece], metadata: dict[str, str], head: bytes | None = None
) -> tuple[bytes, list[tuple[Piece, int]]]:
    """Header bytes and absolute offset of every piece, in `file_order`, or in the given order behind a given `head`.

    Raises:
        CheckpointError: names that no file can hold: two equal ones, or one the format keeps for itself.
    """
    if head is not None:
        return head, _placed(pieces, len(head))
    ordered = file_order(pieces)
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for piece in ordered:
        allowed = piece.name != "__metadata__" and piece.name.isprintable()
        if piece.name in header or not allowed:
            why = "two tensors have the name" if allowed else "the format has no place for a tensor named"
            raise CheckpointError(f"cannot be written as safetensors: {why} {printable(piece.name[:200])!r}")
        header[piece.name] = {
            "dtype": piece.dtype,
            "shape": list(piece.shape),
            "data_offsets": [offset, offset + piece.nbytes],
        }
        offset += piece.nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER_BYTES:
        raise CheckpointError(f"cannot be written as one file: its header of {len(raw):,} bytes is too long")
    return len(raw).to_bytes(8, "little") + raw, _placed(ordered, 8 + len(raw))


def _placed(pieces: Iterable[Piece], offset: int) -> list[tuple[Piece, int]]:
    """Each piece with its offset, one behind the other."""
    placed = []
    for piece in pieces:
        placed.append((piece, offset))
        offset += piece.nbytes
    return placed


def file_bytes(pieces: Sequence[Piece], metadata: dict[str, str], head: bytes | None = None) -> int:
    """The exact size of the file that `write_file` would write."""
    head, _ = _layout(pieces, metadata, head)
    return len(head) + sum(piece.nbytes for piece in pieces)


def write_file(
    path: Path,
    pieces: Sequence[Piece],
    metadata: dict[str, str],
    *,
    advance: Callable[[int], None] = lambda count: None,
    head: bytes | None = None,
) -> int:
    """Write one safetensors file in place (the caller renames it), copying ranges while computing the rest.

    Args:
        path: a partial file's path; it is created, or truncated.
        pieces: the tensors, in any order; the same pieces give the same bytes.
        metadata: text to text, stored under ``__metadata__``.
        advance: told the number of bytes written since it was last called, from two threads.
        head: the length and header of a file that is to come out byte for byte as it was; it describes the pieces in
            the order given, and holds the metadata.

    Returns:
        The size of the file, which is on the disk (fsync) and re-opened: header, names and shapes are as planned.

    Raises:
        OutputError: the disk filled up, the file cannot be written, or it does not hold what was planned.
        CheckpointError: names that no file can hold, or an input that vanished or changed since its header was read.
    """
    head, placed = _layout(pieces, metadata, head)
    total = len(head) + sum(piece.nbytes for piece in pieces)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            _write_all(descriptor, memoryview(head), 0, lambda count: None)
            os.truncate(descriptor, total)
            stop: list[bool] = []
            with ThreadPoolExecutor(1) as pool:
                ranges = _merged(placed)
                copying = pool.submit(_copy_ranges, ranges, descriptor, advance, stop)
                try:
                    for piece, offset in placed:
                        if piece.produce is not None:
                            _write_buffers(descriptor, piece, offset, advance)
                    copying.result()
                except BaseException:
                    stop.append(True)
                    raise
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror or error}", where=str(path)) from error
    _verify(path, pieces)
    return total


def _verify(path: Path, pieces: Iterable[Piece]) -> None:
    """Re-open what was written: it is whole, and its names, types and shapes are those planned."""
    try:
        written = {name: (info.dtype, info.shape) for name, info in read_header(path).tensors.items()}
    except CheckpointError as error:
        raise OutputError(f"was written but cannot be read back: {error.message}", where=str(path)) from error
    if written != {piece.name: (piece.dtype, piece.shape) for piece in pieces}:
        raise OutputError("was written but does not hold the tensors that were planned", where=str(path))


def _write_buffers(descriptor: int, piece: Piece, offset: int, advance: Callable[[int], None]) -> None:
    assert piece.produce is not None
    position = offset
    for buffer in piece.produce():
        position = _write_all(descriptor, memoryview(buffer).cast("B"), position, advance)
    _start_writeback(descriptor, offset, piece.nbytes)
    if position != offset + piece.nbytes:
        found, planned = f"{position - offset:,} bytes", f"{piece.nbytes:,} were planned"
        raise OutputError(f"tensor {printable(piece.name)!r} was computed as {found}, {planned}")


def _write_all(descriptor: int, view: memoryview, position: int, advance: Callable[[int], None]) -> int:
    """Write a buffer, in as many calls as the system wants; returns the position behind it."""
    while view:
        count = os.pwrite(descriptor, view, position)
        position, view = position + count, view[count:]
        advance(count)
    return position


def _start_writeback(descriptor: int, offset: int, count: int) -> None:
    """Have the disk begin on a range just written, so that the fsync at the end finds little left to do.

    The advice drops pages only once they are clean, and these are not yet: the output stays cached.
    """
    if count >= WRITEBACK_BYTES and hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # it is advice: a file system that takes none loses time, nothing else
            os.posix_fadvise(descriptor, offset, count, os.POSIX_FADV_DONTNEED)


@dataclass(slots=True)
class _Range:
    info: TensorInfo  # of the first tensor, for its file
    source: int
    target: int
    count: int


def _merged(placed: Iterable[tuple[Piece, int]]) -> list[_Range]:
    """Ranges to copy; neighbours that are neighbours in the input too become one."""
    ranges: list[_Range] = []
    for piece, target in placed:
        info = piece.source
        if info is None or piece.nbytes == 0:
            continue
        last = ranges[-1] if ranges else None
        if (
            last is not None
            and (last.info.path, last.info.stamp) == (info.path, info.stamp)
            and last.source + last.count == info.offset
            and last.target + last.count == target
        ):
            last.count += piece.nbytes
        else:
            ranges.append(_Range(info, info.offset, target, piece.nbytes))
    return ranges


def _copy_ranges(ranges: Iterable[_Range], descriptor: int, advance: Callable[[int], None], stop: list[bool]) -> None:
    sources: dict[tuple[Path, Stamp | None], int] = {}
    try:
        for item in ranges:
            file = (item.info.path, item.info.stamp)
            if file not in sources:
                sources[file] = open_input(item.info)
            source, done = sources[file], 0
            while done < item.count and not stop:
                count = _copy_some(
                    source, descriptor, item.source + done, item.target + done, min(item.count - done, COPY_BYTES)
                )
                if count == 0:
                    raise CheckpointError("the file ended while it was copied", where=str(item.info.path))
                _start_writeback(descriptor, item.target + done, count)
                done += count
                advance(count)
    finally:
        for source in sources.values():
            os.close(source)


def _copy_some(source: int, target: int, source_offset: int, target_offset: int, count: int) -> int:
    """Copy inside the kernel where the system can, else through a small buffer; 0 where the source ends."""
    if hasattr(os, "copy_file_range"):
        try:
            copied = os.copy_file_range(source, target, count, source_offset, target_offset)
            if copied:  # some kernels say 0 for files they cannot copy; the plain copy knows better
                return copied
        except OSError as error:
            if error.errno not in _NO_KERNEL_COPY:
                raise
    return os.pwrite(target, os.pread(source, min(count, BUFFER_BYTES), source_offset), target_offset)
