"""CIFAR-10 and CIFAR-100 as their authors pack them: pickles of Python, or flat binary records.

A pickle is read as data (`checkpoints/pickle_tree.py`): nothing in it is imported or called, and what is not an array
of pixels and a list of labels is refused.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ortho_cli.checkpoints.pickle_policy import admit
from ortho_cli.checkpoints.pickle_records import Made, show
from ortho_cli.checkpoints.pickle_tree import read_tree
from ortho_cli.errors import CheckpointError, RecipeError

from .image_specs import Split

__all__ = ["find_cifar", "read_cifar"]

PIXELS = 3 * 32 * 32  # red plane, green plane, blue plane, each by rows
MAX_FILE_BYTES = 400_000_000  # the largest real file, CIFAR-100's train, has 155 MB

_TRAIN = [f"data_batch_{number}" for number in range(1, 6)]
# set -> layout folder -> file names by split; a binary record starts with so many bytes, the last of which is the label
_FILES: dict[str, dict[str, dict[Split, list[str]]]] = {
    "cifar10": {
        "cifar-10-batches-py": {"train": _TRAIN, "eval": ["test_batch"]},
        "cifar-10-batches-bin": {"train": [f"{name}.bin" for name in _TRAIN], "eval": ["test_batch.bin"]},
    },
    "cifar100": {
        "cifar-100-python": {"train": ["train"], "eval": ["test"]},
        "cifar-100-binary": {"train": ["train.bin"], "eval": ["test.bin"]},
    },
}
_LABEL_BYTES = {"cifar10": 1, "cifar100": 2}
_LABEL_KEY = {"cifar10": "labels", "cifar100": "fine_labels"}
_RECONSTRUCT = {f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")}
_FROM_BUFFER = {f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")}


def find_cifar(folder: Path, name: str, split: Split) -> list[Path] | None:
    """The files of a split, below a folder or in it; None where a layout is not there or not whole."""
    for layout, files in _FILES[name].items():
        for root in (folder / layout, folder):
            paths = [root / file for file in files[split]]
            if all(path.is_file() for path in paths):
                return paths
    return None


def read_cifar(paths: list[Path], name: str) -> tuple[Tensor, Tensor]:
    """Read CIFAR files, pickled or binary, one after the other.

    Args:
        paths: of one split, in order.
        name: `cifar10` or `cifar100` (whose fine labels are read).

    Returns:
        Pictures `(N, 3, 32, 32)` uint8, and labels `(N,)` int64.

    Raises:
        RecipeError: a file is no CIFAR file; for a pickle that would import or call something, the name of it.
    """
    read = [_read_binary(path, name) if path.suffix == ".bin" else _read_pickle(path, name) for path in paths]
    pixels, labels = torch.cat([pixels for pixels, _ in read]), torch.cat([labels for _, labels in read])
    return pixels.view(-1, 3, 32, 32), labels


def _bytes_of(path: Path) -> bytes:
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise RecipeError(f"{size:,} bytes, more than any CIFAR file has", where=str(path))
    return path.read_bytes()


def _read_binary(path: Path, name: str) -> tuple[Tensor, Tensor]:
    data, head = _bytes_of(path), _LABEL_BYTES[name]
    if not data or len(data) % (head + PIXELS):
        raise RecipeError(
            f"{len(data):,} bytes are no whole number of {name} records of {head + PIXELS}", where=str(path)
        )
    records = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, head + PIXELS)
    return records[:, head:].contiguous(), records[:, head - 1].long()


def _read_pickle(path: Path, name: str) -> tuple[Tensor, Tensor]:
    try:
        root = read_tree(_bytes_of(path), admit).root
        if not isinstance(root, Made) or root.path != "builtins.dict":
            raise CheckpointError(f"expected a dict, found {show(root)}")
        entries = {_bytes(key): value for key, value in root.pairs or ()}
        labels = entries.get(_LABEL_KEY[name].encode())
        if (
            not isinstance(labels, list)
            or not labels
            or not all(type(label) is int and 0 <= label < 256 for label in labels)
        ):
            raise CheckpointError(f"its {_LABEL_KEY[name]} are {show(labels)}, expected a list of small numbers")
        data = _array_bytes(entries.get(b"data"))
    except CheckpointError as error:
        raise RecipeError(f"no {name} file: {error.message}", hint=error.hint, where=str(path)) from error
    if len(data) != len(labels) * PIXELS:
        raise RecipeError(f"{len(labels):,} labels, but {len(data):,} bytes of pixels", where=str(path))
    pixels = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, PIXELS)
    return pixels, torch.tensor(labels)


def _array_bytes(value: object) -> bytes:
    """The bytes of a pickled uint8 array in row order, as numpy has written it through the years.

    `_reconstruct(ndarray, (0,), b'b')` whose state is (version, shape, dtype, is_fortran, bytes), or, in protocol 5,
    `_frombuffer(bytes, dtype, shape, order)`.
    """
    raw: object = None
    if isinstance(value, Made) and value.path in _RECONSTRUCT and value.states:
        state = value.states[-1]
        if isinstance(state, tuple) and len(state) == 5 and _is_uint8(state[2]) and state[3] in (False, 0):
            raw = state[4]
    elif isinstance(value, Made) and value.path in _FROM_BUFFER and len(value.args) == 4:
        data, dtype, _, order = value.args
        raw = data if _is_uint8(dtype) and order == "C" else None
    found = _bytes(raw)
    if found is None:
        raise CheckpointError(f"its data is {show(value)}, expected a row-major array of uint8")
    return found


def _bytes(value: object) -> bytes | None:
    """Bytes, however they were pickled: Python 2's come as text of one character a byte, and so do protocol 2's, in an
    `encode` that was not called."""
    if isinstance(value, Made) and value.path == "_codecs.encode" and len(value.args) == 2:
        value = value.args[0]
    if isinstance(value, str):
        try:
            return value.encode("latin-1")
        except UnicodeEncodeError:
            return None
    return bytes(value) if isinstance(value, bytes | bytearray) else None


def _is_uint8(value: object) -> bool:
    return isinstance(value, Made) and value.path == "numpy.dtype" and bool(value.args) and value.args[0] == "u1"
