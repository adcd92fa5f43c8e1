"""Pictures in an LMDB database, as LSUN is handed out: encoded files by key, decoded when they are asked for."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ortho_cli.errors import RecipeError, UsageError

from .image_specs import Split
from .pictures import decoded

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["LmdbPictures", "find_lsun"]

PARTS: dict[Split, str] = {"train": "train", "eval": "val"}


def find_lsun(folder: Path, category: str, split: Split) -> Path | None:
    """The database of a split, `CATEGORY_train_lmdb` or `CATEGORY_val_lmdb`; None where it is not there."""
    path = folder / f"{category}_{PARTS[split]}_lmdb"
    return path if (path / "data.mdb").is_file() else None


class LmdbPictures:
    """The values of a database as pictures, in the order of their keys.

    Args:
        path: the folder of `data.mdb`; it is only read, and no lock file is written beside it.
        keys: of some pictures; None: of all.

    Raises:
        UsageError: lmdb is not installed.
        RecipeError: no such database.

    Cost: all keys are read; values when they are asked for.
    """

    def __init__(self, path: Path, keys: Sequence[bytes] | None = None) -> None:
        self.path = path
        self.keys = _keys(path) if keys is None else list(keys)

    def __len__(self) -> int:
        return len(self.keys)

    def open(self, place: int) -> Image:
        """The picture at a place, decoded.

        Raises:
            UsageError: Pillow is not installed.
            RecipeError: no picture, or cut short.
        """
        key = self.keys[place]
        with _environment(self.path).begin() as transaction:
            value = transaction.get(key)
        return decoded(io.BytesIO(value or b""), f"{self.path}:{key.decode(errors='replace')}")

    def select(self, places: Sequence[int]) -> LmdbPictures:
        """The pictures at some places."""
        return LmdbPictures(self.path, [self.keys[place] for place in places])


_opened: dict[Path, tuple[int, Any]] = {}  # by which process; LMDB allows one opening in each


def _environment(path: Path) -> Any:
    """The open database. What a parent opened before a fork may not be used here, and is closed."""
    process, environment = _opened.pop(path, (0, None))
    if process != os.getpid():
        if environment is not None:
            environment.close()
        environment = _open(path)
    _opened[path] = os.getpid(), environment
    return environment


def _open(path: Path) -> Any:
    try:
        import lmdb
    except ImportError as error:
        raise UsageError("LSUN's databases are read by lmdb", hint="pip install lmdb") from error
    try:
        return lmdb.open(str(path), readonly=True, lock=False, readahead=False, create=False)
    except lmdb.Error as error:
        raise RecipeError(f"no LMDB database: {str(error)[:200]}", where=str(path)) from error


def _keys(path: Path) -> list[bytes]:
    with _environment(path).begin() as transaction, transaction.cursor() as cursor:
        return list(cursor.iternext(keys=True, values=False))
