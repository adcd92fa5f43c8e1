"""Pickled checkpoints (`.ckpt`, `.bin`, `.pt`, `.pth`) as names and byte ranges; the only place a pickle is read.

Neither torch nor `pickle` takes part: the file is a zip archive of uncompressed records (pickle_zip.py), its `data.pkl`
is read as data (pickle_tree.py), and the tensors in it become ranges of the file (pickle_tensors.py).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import IO

from ortho_cli.checkpoints.legacy_pickle import is_legacy, read_legacy, read_legacy_trees
from ortho_cli.checkpoints.pickle_policy import admit, full_name, is_known
from ortho_cli.checkpoints.pickle_records import show
from ortho_cli.checkpoints.pickle_tensors import Storage, StorageId, locate_tensor
from ortho_cli.checkpoints.pickle_tree import Admit, Tree, read_tree
from ortho_cli.checkpoints.pickle_weights import Weights, find_weights
from ortho_cli.checkpoints.pickle_zip import Record, read_archive
from ortho_cli.checkpoints.tensors import TensorInfo, stamp_of
from ortho_cli.errors import CheckpointError

__all__ = ["PickleContents", "read_pickle", "scan_globals"]

# v1-5's data.pkl has 0.2 MB; what is larger than this keeps its data in the pickle and is no checkpoint.
MAX_PICKLE_BYTES = 256 * 2**20
MAX_LISTED = 10  # names a note spells out


@dataclass(frozen=True, slots=True)
class PickleContents:
    """The tensors of a pickled checkpoint, and what else a reader of the report should know of it.

    `globals`: every import the pickle names, in order. `placeholders`: those of them that are neither torch's nor
    numpy's way to write data; none was imported, and none occurs in the weights.
    """

    tensors: dict[str, TensorInfo]
    globals: tuple[str, ...]
    placeholders: tuple[str, ...]
    notes: tuple[str, ...]


def read_pickle(path: str | Path) -> PickleContents:
    """List the tensors of a pickled checkpoint without running any of it.

    Reads torch's zip format and its format of before 1.6. A nested `state_dict` is unwrapped; else, where the top
    level holds no tensor, the one entry that does and has a usual name (`model`, `params`, ...).

    Args:
        path: the file; of its tensors no byte is read.

    Returns:
        Tensors in the order of the state dict, each with its dtype, shape and absolute offset in `path`. Strides are
        None unless the tensor is a transposed or expanded view. Tied tensors have the same offset.

    Raises:
        CheckpointError: no such format, a damaged or compressed archive, an import from a module that runs things, a
            class that is neither torch's nor numpy's among the weights, no weights or several sets of them, a tensor
            that is not dense or that leaves its storage, a storage that is missing or of another size.

    Cost: 0.2 s for the 1,831 tensors of v1-5; memory a few times the pickle (at most 256 MB), whatever the file says.
    Use instead: :func:`scan_globals` to see what a refused file would have imported.
    """
    path = Path(path)
    with _opened(path) as (file, size):
        tree, storage_of = _read(file, size, admit)
        weights = find_weights(tree.root)
        stamp = stamp_of(os.fstat(file.fileno()))
        tensors = {
            name: replace(locate_tensor(name, value, path, storage_of), stamp=stamp)
            for name, value in weights.tensors.items()
        }
        placeholders = tuple(name for name in tree.globals if not is_known(name))
        return PickleContents(tensors, tree.globals, placeholders, _notes(weights, placeholders))


def scan_globals(path: str | Path) -> list[str]:
    """List every import that a pickled checkpoint, or a bare pickle, names; also of files that are refused.

    Args:
        path: the file.

    Returns:
        `module.name` in order of first appearance, each once; `copyreg.extension_N` for an import by number.

    Raises:
        CheckpointError: the file holds no well-formed pickle; the hint lists the imports before the damage.

    Cost: as :func:`read_pickle`.
    """
    found: dict[str, None] = {}

    def note(module: str, name: str) -> str:
        found[full_name(module, name)] = None
        return full_name(module, name)

    with _opened(Path(path)) as (file, size):
        head = _head(file)
        try:
            if is_legacy(head):
                read_legacy_trees(file, min(size, MAX_PICKLE_BYTES), note)
            elif head.startswith(_BARE):
                _pickle(file, Record(0, size), note)
            else:
                _read(file, size, note)
        except CheckpointError as error:
            if found:
                error.hint = f"imports before that: {_listed([*found])}"
            raise
    return [*found]


_BARE = (b"\x80", b"(", b"c", b"]", b"}")  # how pickles begin: a protocol number, or a first opcode of protocols 0, 1

StorageOf = Callable[[StorageId], Storage]


def _read(file: IO[bytes], size: int, admit: Admit) -> tuple[Tree, StorageOf]:
    """The tree of the file's object, and where its storages lie."""
    head = _head(file)
    if head.startswith(b"PK"):
        records = read_archive(file, size)
        return _pickle(file, records["data.pkl"], admit), lambda named: _record_of(records, named)
    if is_legacy(head):
        tree, storages = read_legacy(file, size, min(size, MAX_PICKLE_BYTES), admit)
        return tree, lambda named: storages[named.key]
    raise CheckpointError(
        f"not a checkpoint that can be read: {_describe(head)}",
        hint="on a machine where you trust it: torch.save(torch.load(FILE), 'new.pt'), or save it as .safetensors",
    )


def _head(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read(512)


def _pickle(file: IO[bytes], record: Record, admit: Admit) -> Tree:
    """The tree of the pickle that fills a record."""
    if record.size > MAX_PICKLE_BYTES:
        raise CheckpointError(f"a pickle of {record.size:,} bytes; at most {MAX_PICKLE_BYTES:,} are read")
    file.seek(record.offset)
    stream = BytesIO(file.read(record.size))
    tree = read_tree(stream, admit)
    if stream.tell() != record.size:
        raise CheckpointError(f"{record.size - stream.tell():,} bytes follow the end of the pickle")
    return tree


def _record_of(records: dict[str, Record], named: StorageId) -> Storage:
    record = records.get(f"data/{named.key}")
    if record is None:
        raise CheckpointError(f"its storage {show(named.key)} is missing from the archive")
    if record.size != named.numel * named.itemsize:
        raise CheckpointError(
            f"its storage {show(named.key)} has {record.size:,} bytes, the pickle says {named.numel * named.itemsize:,}"
        )
    return Storage(record.offset, record.size)


_OTHER_FORMATS = (
    (b"", "the file is empty"),
    (b"version https://git-lfs", "a git-lfs pointer; fetch the file itself with: git lfs pull"),
    (b"<", "a web page (a failed download?)"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a numpy array"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"GGUF", "a GGUF file"),
)


def _describe(head: bytes) -> str:
    """What a file that is no checkpoint seems to be."""
    for magic, what in _OTHER_FORMATS:
        if head.startswith(magic) and (magic or not head):
            return what
    if head[257:262] == b"ustar":
        return "a tar archive (torch's format of before 0.1.10, or a packed folder)"
    if head[8:9] == b"{":
        return "a safetensors file under another name; rename it to end in .safetensors"
    if head.startswith(b"\x80"):
        return f"a bare pickle of protocol {head[1] if len(head) > 1 else '?'}, not written by torch.save"
    return f"its first bytes are {head[:8]!r}"


def _notes(weights: Weights, placeholders: tuple[str, ...]) -> tuple[str, ...]:
    notes = []
    if weights.inside:
        notes.append(f"the weights were taken from the entry {' > '.join(weights.inside)}")
    if weights.beside:
        notes.append(f"not read, beside the weights: {_listed(weights.beside)}")
    if weights.leftovers:
        notes.append(f"not tensors, left out of the weights: {_listed(weights.leftovers)}")
    if placeholders:
        count = "1 class" if len(placeholders) == 1 else f"{len(placeholders)} classes"
        notes.append(f"{count} outside the weights left inert, never imported: {_listed(placeholders)}")
    return tuple(notes)


def _listed(names: list[str] | tuple[str, ...]) -> str:
    more = f", and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], int]]:
    """An ordinary file and its size; every error inside says which file it was."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise CheckpointError("not a file")
        with open(path, "rb") as file:
            yield file, os.fstat(file.fileno()).st_size
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    except CheckpointError as error:
        error.where = str(path)
        raise
