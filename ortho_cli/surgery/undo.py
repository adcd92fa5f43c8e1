"""The undo file of a merge: what turns the merged checkpoint back into its base, bit for bit.

A safetensors file of bytes. Headers of the base's weight files are kept verbatim, so that order and metadata come back
too; of tensors only those that changed, as differences (`undo_blocks.py`); of other files only those that the merge
wrote anew. `ortho.undo` in the metadata lists everything with its SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from ortho_cli.checkpoints.fingerprint import base_fingerprint
from ortho_cli.checkpoints.header import read_header
from ortho_cli.checkpoints.index import read_index
from ortho_cli.checkpoints.reading import TensorReader
from ortho_cli.checkpoints.store import Checkpoint, WeightFile, open_checkpoint
from ortho_cli.checkpoints.tensors import FLOAT_DTYPES, TensorInfo
from ortho_cli.checkpoints.writer import Piece, computed, write_file
from ortho_cli.errors import CheckpointError, UsageError

from .mirror import small_files
from .plan import Advance, Companion, Plan
from .undo_blocks import blocks_of, encoded, same_bytes

__all__ = ["FILE", "HEADER", "TENSOR", "Record", "changed_fingerprint", "hash_file", "hash_tensor", "keep_undo"]

VERSION = 1
HEADER, TENSOR, FILE = "header/", "tensor/", "file/"  # before names, in the undo file
READ_BYTES = 2**20


@dataclass
class Record:
    """What `ortho.undo` says.

    Attributes:
        files: place of each weight file of the base -> its component and size.
        tensors: full name in the base -> SHA-256 of its bytes, name in the merged checkpoint (None: not there), and
            the SHA-256 there.
        copies: place of each other file that both have alike -> its SHA-256.
        fingerprint: of the merged weights that differ from the base's.
        version: of this form.
    """

    files: dict[str, tuple[str, int]] = field(default_factory=dict)
    tensors: dict[str, tuple[str, str | None, str | None]] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    fingerprint: str = ""
    version: int = VERSION


def keep_undo(
    plan: Plan, base: Checkpoint, path: Path, changed: Mapping[str, TensorInfo], renamed: Mapping[str, str]
) -> None:
    """Have a plan that writes a changed copy of `base` leave an undo file, too.

    Args:
        plan: of a merge; its `companion` is set here, and its totals say how large the file became.
        base: what is to come back.
        path: of the undo file.
        changed: the base's tensors that will differ or be missing, by their full names.
        renamed: full names in the base -> in the output, where they differ.

    Raises:
        UsageError: the base is a pickle, which is never written, or `path` is no place for a file beside the output.
    """
    if base.format != "safetensors":
        raise UsageError(
            f"--keep-undo restores a base byte for byte, and {base.root.name} is a pickle, which ortho does not write",
            hint=f"convert it first: ortho convert {base.root.name} --to safetensors -o BASE.safetensors",
        )
    if path.suffix != ".safetensors":
        raise UsageError(
            f"--keep-undo {path.name} is not named like the file it will be", hint=f"use {path.stem}.safetensors"
        )
    output, place = plan.output.absolute(), path.absolute()
    if place == output or (output in place.parents and output.suffix != ".safetensors"):
        raise UsageError(f"--keep-undo {path} is inside the output", hint="name a file beside it")
    small = {relative: source for source, relative in small_files(base, plan.output)[0]} | _indices(base)
    bytes_changed = sum(info.nbytes for info in changed.values())

    def write(partial: Path, own: Path, advance: Advance) -> None:
        merged = open_output(partial)
        with tempfile.TemporaryFile(dir=own.parent) as spool:
            _Writer(base, merged, renamed, spool, advance).write(own, small, partial, plan.files[0].metadata)
        plan.totals["undo_bytes"] = own.stat().st_size
        plan.totals["undo_share"] = own.stat().st_size / bytes_changed if bytes_changed else 0.0

    plan.totals["changed_bytes"] = bytes_changed
    plan.extra_bytes += sum(info.nbytes for info in base.tensors.values())
    plan.companion = Companion(path, 2 * bytes_changed, write)  # the file, and what it is gathered from


def open_output(partial: Path) -> Checkpoint:
    """A finished output before it has its name, by which a single file would be known."""
    if partial.is_dir():
        return open_checkpoint(partial)
    header = read_header(partial)
    file = WeightFile(partial, "", "", "safetensors", header.metadata, tuple(header.tensors))
    return Checkpoint(str(partial), partial, "file", (file,), header.tensors)


def changed_fingerprint(merged: Checkpoint, record: Record) -> str:
    """The fingerprint of a merged checkpoint's weights that are not the base's."""
    changed = {name for own, name, there in record.tensors.values() if own != there and name is not None}
    layers = [
        layer
        for layer in merged.layers()
        if merged.weight(layer).name in changed and merged.weight(layer).dtype in FLOAT_DTYPES
    ]
    return base_fingerprint(merged, layers)


def hash_tensor(info: TensorInfo, advance: Advance) -> str:
    """SHA-256 of a tensor's bytes."""
    digest = hashlib.sha256()
    with TensorReader() as reader:
        for block in blocks_of(reader, info):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a small file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _indices(base: Checkpoint) -> dict[str, Path]:
    """The index files of the weights that were opened: others beside them list files that a merge leaves behind."""
    opened = {file.path.parent: file.relative.rpartition("/")[0] for file in base.files if file.relative}
    names = {file.path.name for file in base.files}
    found = {}
    for folder, place in opened.items():
        for path in sorted(folder.glob("*.safetensors.index*.json")):
            if set(read_index(path)[0].values()) <= names:
                found[f"{place}/{path.name}" if place else path.name] = path
    return found


@dataclass
class _Writer:
    """Gathers what is compressed, whose length nobody knows before, and writes the undo file from it."""

    base: Checkpoint
    merged: Checkpoint
    renamed: Mapping[str, str]
    spool: IO[bytes]
    advance: Advance
    record: Record = field(default_factory=Record)
    pieces: list[Piece] = field(default_factory=list)

    def write(self, own: Path, small: Mapping[str, Path], output: Path, provenance: Mapping[str, str]) -> None:
        """Everything of the base that `output`, its changed copy, does not hold."""
        for file in self.base.files:
            self.record.files[file.relative] = file.component, file.path.stat().st_size
            with open(file.path, "rb") as opened:
                length = opened.read(8)
                self._keep(HEADER + file.relative, [length, opened.read(int.from_bytes(length, "little"))])
        for name, info in self.base.tensors.items():
            self._tensor(name, info)
        for relative, source in small.items():
            there = output / relative
            if there.is_file() and there.read_bytes() == source.read_bytes():
                self.record.copies[relative] = hash_file(source)
            else:
                self._keep(FILE + relative, [source.read_bytes()])
        self.record.fingerprint = changed_fingerprint(self.merged, self.record)
        ours = {key: value for key, value in provenance.items() if key in ("ortho.version", "ortho.command")}
        write_file(own, self.pieces, {"format": "pt", **ours, "ortho.undo": json.dumps(asdict(self.record))})

    def _tensor(self, name: str, info: TensorInfo) -> None:
        there = self.merged.tensors.get(self.renamed.get(name, name))
        if there is not None and same_bytes(info, there):
            alike = hash_tensor(info, self.advance)
            self.record.tensors[name] = (alike, there.name, alike)
            return
        comparable = there is not None and (info.dtype, info.shape) == (there.dtype, there.shape)
        digest = hashlib.sha256()

        def see(block: memoryview) -> None:
            digest.update(block)
            self.advance(len(block))

        self._keep(TENSOR + name, encoded(info, there if comparable else None, see))
        now = hash_tensor(there, lambda count: None) if there is not None else None
        self.record.tensors[name] = (digest.hexdigest(), there.name if there is not None else None, now)

    def _keep(self, name: str, parts: Sequence[bytes] | Iterator[bytes]) -> None:
        start = self.spool.seek(0, 2)
        for part in parts:
            self.spool.write(part)
        count = self.spool.tell() - start
        self.pieces.append(computed(name, "U8", (count,), lambda: self._read(start, count)))

    def _read(self, start: int, count: int) -> Iterator[Any]:
        self.spool.seek(start)
        while count:
            part = self.spool.read(min(count, READ_BYTES))
            if not part:
                raise CheckpointError("what was gathered for the undo file is gone")
            count -= len(part)
            yield part
