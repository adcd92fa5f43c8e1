"""Restore a base exactly, from a merged checkpoint and the undo file that the merge left.

Nothing of the output exists before every tensor of the merged checkpoint has been found to be the one that the undo
file was made for, and each restored tensor is checked against its SHA-256 while it is written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ortho_cli.checkpoints.header import parse_header, quoted
from ortho_cli.checkpoints.reading import TensorReader
from ortho_cli.checkpoints.store import Checkpoint, open_checkpoint
from ortho_cli.checkpoints.strict_json import parse_strict
from ortho_cli.checkpoints.tensors import TensorInfo
from ortho_cli.checkpoints.writer import Piece, computed, copied
from ortho_cli.errors import CheckpointError, UsageError

from .fit import input_files
from .plan import Advance, OutputFile, Plan
from .undo import FILE, HEADER, TENSOR, VERSION, Record, changed_fingerprint, hash_file, hash_tensor
from .undo_blocks import decoded

__all__ = ["plan_undo"]

MAX_TEXT_BYTES = 200_000_000  # of a header or a small file


def plan_undo(merged: Checkpoint, undo: Path, output: Path) -> Plan:
    """Plan the exact restoration of a base; headers, and 8 kB of each changed layer, are read.

    Args:
        merged: what `ortho merge --keep-undo` wrote; its sharding may have changed since, its tensors may not.
        undo: the file it left.
        output: like the base was: one `.safetensors`, or a folder.

    Raises:
        CheckpointError: no undo file, or not that of `merged`.
        UsageError: the base was a folder and the output is a file, or the other way round.
    """
    opened = open_checkpoint(undo)
    record = read_record(opened)
    restoring = _Restoring(merged, opened, record)
    _check_output(record, output)
    files = [restoring.file(relative, component, size) for relative, (component, size) in record.files.items()]
    plan = Plan("unmerge", [*input_files(merged), *input_files(opened)], output, files)
    restoring.check_fingerprint()
    small = {relative: merged.root / relative for relative in record.copies}
    for relative, path in small.items():
        if merged.root.is_file() or not path.is_file():
            raise restoring.other(f"it lacks {quoted(relative)}")
    plan.copies = [(path, relative) for relative, path in small.items()]
    stored = [name for name in opened.tensors if name.startswith(FILE)]
    plan.blobs = {name.removeprefix(FILE): restoring.content(name) for name in stored}
    plan.details = restoring.details
    plan.layers = len(plan.details)
    plan.parameters = sum(detail["parameters"] for detail in plan.details)
    plan.before = restoring.check
    plan.extra_bytes = sum(info.nbytes for info in restoring.needed.values())
    plan.totals = {
        "exact": True,
        "restored": len(plan.details),
        "changed_bytes": restoring.changed_bytes,
        "undo_bytes": undo.stat().st_size,
    }
    plan.notes = [*merged.notes]
    return plan


def read_record(undo: Checkpoint) -> Record:
    """What an undo file says, its types checked.

    Raises:
        CheckpointError: it is none, or one of a later version.
    """
    where = str(undo.root)
    text = undo.metadata.get("ortho.undo")
    if text is None:
        raise CheckpointError(
            f"{undo.root.name} is no undo file", hint="one is written by: ortho merge ... --keep-undo FILE", where=where
        )
    try:
        found = parse_strict(text.encode())
        version, fields = found["version"], {name: found[name] for name in Record.__dataclass_fields__}
        record = Record(**fields)
        texts = [*record.files, *record.copies, *record.copies.values(), record.fingerprint]
        texts += [component for component, size in record.files.values() if isinstance(size, int)]
        texts += [part for own, _, there in record.tensors.values() for part in (own, there or "")]
        texts += [name or "" for _, name, _ in record.tensors.values()]
        sound = all(isinstance(text, str) for text in texts) and version == VERSION
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the record of the undo file is damaged: {str(error)[:120]}", where=where) from error
    if not sound:
        raise CheckpointError(
            f"an undo file of version {version}; this ortho reads version {VERSION}", hint="update ortho", where=where
        )
    for relative in [
        *record.files,
        *record.copies,
        *(n.removeprefix(FILE) for n in undo.tensors if n.startswith(FILE)),
    ]:
        if relative and not _stays_inside(relative):
            raise CheckpointError(f"the undo file names a file outside of its folder: {quoted(relative)}", where=where)
    return record


def _stays_inside(relative: str) -> bool:
    parts = PurePosixPath(relative).parts
    plain = PureWindowsPath(relative)
    return not (plain.is_absolute() or plain.drive or plain.root or ".." in {*parts, *plain.parts})


def _check_output(record: Record, output: Path) -> None:
    single = list(record.files) == [""]
    if single and output.suffix != ".safetensors":
        raise UsageError("the base was one file", hint=f"use -o {output.name}.safetensors")
    if not single and output.suffix == ".safetensors":
        raise UsageError("the base was a folder", hint=f"use -o {output.with_suffix('').name}")


@dataclass
class _Restoring:
    """One undo file at work on one merged checkpoint."""

    merged: Checkpoint
    undo: Checkpoint
    record: Record

    def __post_init__(self) -> None:
        self.needed: dict[str, TensorInfo] = {}
        self.details: list[dict[str, Any]] = []
        self.changed_bytes = 0

    def other(self, reason: str) -> CheckpointError:
        """The error of a merged checkpoint that is not the one the undo file was made for."""
        return CheckpointError(
            f"{self.merged.root.name} is not the checkpoint that {self.undo.root.name} was made for: {reason}",
            hint="give the very output of that merge; without it: ortho unmerge MERGED ADAPTER -o BASE (not exact)",
            where=str(self.merged.root),
        )

    def file(self, relative: str, component: str, size: int) -> OutputFile:
        """One weight file of the base: its header as it was, its tensors copied or decoded."""
        head = self.content(HEADER + relative)
        if int.from_bytes(head[:8], "little") != len(head) - 8:
            raise self._damaged(f"the header of {quoted(relative)} has {len(head):,} bytes")
        tensors = parse_header(head[8:], self.undo.root, len(head), size).tensors
        prefix = f"{component}." if component else ""
        return OutputFile(relative, [self._piece(prefix + name, info) for name, info in tensors.items()], {}, head)

    def _piece(self, full: str, info: TensorInfo) -> Piece:
        if full not in self.record.tensors:
            raise self._damaged(f"it says nothing of tensor {quoted(full)}")
        digest, there, _ = self.record.tensors[full]
        source = self.merged.tensors.get(there) if there is not None else None
        if there is not None:
            if source is None:
                raise self.other(f"it lacks tensor {quoted(there)}")
            self.needed[full] = source
        if source is not None and (source.dtype, source.shape) != (info.dtype, info.shape):
            source = None  # nothing of it is in what is to come back
        stored = self.undo.tensors.get(TENSOR + full)
        if stored is None:
            if source is None:
                raise self.other(f"tensor {quoted(full)} has another type or shape, or none")
            return copied(source, info.name)
        self.changed_bytes += info.nbytes
        self.details.append(
            {
                "name": full.removesuffix(".weight"), "shape": list(info.shape), "dtype": info.dtype,
                "kind": "difference" if source is not None else "whole", "rank": None, "parameters": info.numel,
                "stored_bytes": stored.nbytes,
            }
        )  # fmt: skip
        return computed(info.name, info.dtype, info.shape, self._restored(stored, info, source, digest))

    def _restored(
        self, stored: TensorInfo, info: TensorInfo, source: TensorInfo | None, digest: str
    ) -> Callable[[], Iterator[Any]]:
        def produce() -> Iterator[Any]:
            found = hashlib.sha256()
            for block in decoded(stored, info, source):
                found.update(block)
                yield block
            if found.hexdigest() != digest:
                raise self._damaged(f"what it makes of tensor {quoted(info.name)} is not what the base held")

        return produce

    def content(self, name: str) -> bytes:
        """The bytes of a header or a small file.

        Raises:
            CheckpointError: the undo file lacks it.
        """
        info = self.undo.tensors.get(name)
        if info is None or info.dtype != "U8" or info.nbytes > MAX_TEXT_BYTES:
            raise self._damaged(f"{quoted(name)} is missing or no text")
        with TensorReader() as reader:
            return bytes(reader.read_bytes(info, info.offset, info.nbytes))

    def check_fingerprint(self) -> None:
        """Refuse another merge at once, from the edges of its weights."""
        if changed_fingerprint(self.merged, self.record) != self.record.fingerprint:
            raise self.other("its weights have another fingerprint")

    def check(self, advance: Advance) -> None:
        """Refuse, before anything is written, a merged checkpoint in which one byte is another.

        Raises:
            CheckpointError: naming the tensor or file.
        """
        for full, source in self.needed.items():
            if hash_tensor(source, advance) != self.record.tensors[full][2]:
                raise self.other(f"tensor {quoted(source.name)} holds other values")
        for relative, digest in self.record.copies.items():
            if hash_file(self.merged.root / relative) != digest:
                raise self.other(f"{quoted(relative)} has changed")

    def _damaged(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self.undo.root.name} is damaged: {reason}",
            hint="fetch or copy the undo file again",
            where=str(self.undo.root),
        )
