"""torch's format of before 1.6: five pickles in a row (magic number, protocol, system, object, keys), then storages."""

from __future__ import annotations

from typing import IO

from ortho_cli.checkpoints.pickle_records import Made, show
from ortho_cli.checkpoints.pickle_tensors import Storage, StorageId, storage_id
from ortho_cli.checkpoints.pickle_tree import Admit, Tree, read_tree
from ortho_cli.errors import CheckpointError

__all__ = ["is_legacy", "read_legacy", "read_legacy_trees"]

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_MAGIC_BYTES = 64  # room for the pickle of the magic number in any protocol


def is_legacy(head: bytes) -> bool:
    """Whether a file with this beginning claims to be of this format."""
    try:
        return read_tree(head[:_MAGIC_BYTES], lambda module, name: f"{module}.{name}").root == _MAGIC
    except CheckpointError:
        return False


def read_legacy_trees(file: IO[bytes], limit: int, admit: Admit) -> tuple[list[Tree], int]:
    """The five pickles, which must lie in the first `limit` bytes of the file, and the offset behind them."""
    stream = _Window(file, limit)
    return [read_tree(stream, admit) for _ in range(5)], stream.tell()


def read_legacy(file: IO[bytes], size: int, limit: int, admit: Admit) -> tuple[Tree, dict[str, Storage]]:
    """Read the pickles of a file of `size` bytes, which must end before `limit`, and find its storages.

    Returns:
        The object's tree, and each storage by its key.

    Raises:
        CheckpointError: malformed pickles, another protocol, big-endian data, storages that are repeated, missing, of
            another size than the object says, or that do not fill the rest of the file.

    Cost: the pickles, and 8 bytes for each storage.
    """
    (_, protocol, system, tree, keys), offset = read_legacy_trees(file, limit, admit)
    if protocol.root != _PROTOCOL:
        raise CheckpointError(f"torch's old format in protocol {show(protocol.root)}; only {_PROTOCOL} is known")
    if not isinstance(system.root, Made) or ("little_endian", True) not in (system.root.pairs or ()):
        raise CheckpointError("the file does not say that it is little-endian; only such data can be read")

    named: dict[str, StorageId] = {}
    for reference in tree.references:
        found = storage_id(reference)
        known = named.setdefault(found.key, found)
        if (known.dtype, known.numel) != (found.dtype, found.numel):
            raise CheckpointError(f"storage {show(found.key)} has two types or two sizes")
    if not isinstance(keys.root, list) or len(keys.root) != len(named):
        raise CheckpointError(f"the file lists {show(keys.root)} as its storages, the object uses {len(named)}")

    storages: dict[str, Storage] = {}
    for key in keys.root:
        if not isinstance(key, str) or key not in named or key in storages:
            raise CheckpointError(f"the list of storages holds {show(key)} twice or without use")
        file.seek(offset)
        numel = int.from_bytes(file.read(8), "little")
        storages[key] = storage = Storage(offset + 8, numel * named[key].itemsize)
        offset = storage.offset + storage.nbytes
        if numel != named[key].numel or offset > size:
            raise CheckpointError(
                f"storage {show(key)} has {numel:,} elements, the object says {named[key].numel:,}, "
                f"the file has {size:,} bytes: it is damaged or truncated"
            )
    if offset != size:
        raise CheckpointError(f"{size - offset:,} bytes follow the last storage")
    return tree, storages


class _Window:
    """The first bytes of a file as a stream that never reads, or allocates, past their end."""

    def __init__(self, file: IO[bytes], limit: int) -> None:
        file.seek(0)
        self._file, self._limit = file, limit

    def read(self, size: int, /) -> bytes:
        return self._file.read(min(size, self._limit - self._file.tell()))

    def readline(self) -> bytes:
        return self._file.readline(self._limit - self._file.tell())

    def tell(self) -> int:
        return self._file.tell()
