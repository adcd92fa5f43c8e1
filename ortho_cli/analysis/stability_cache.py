"""What was measured before, by file and tensor: an interrupted or a longer series goes on where it was.

A row is one layer of one pair of checkpoints. Its key holds the files (path, size, times), the tensors' places
in them, and every option that the numbers depend on; steps and names of checkpoints are not part of it. SQLite keeps
rows whole when a run is killed, and lets several runs write.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ortho_cli.checkpoints.reading import open_input
from ortho_cli.checkpoints.series import Entry
from ortho_cli.checkpoints.series_layers import SeriesLayer
from ortho_cli.checkpoints.tensors import Stamp, TensorInfo
from ortho_cli.errors import OutputError

if TYPE_CHECKING:
    from .stability import Pair

__all__ = ["ResultCache", "cache_folder"]

FILE = "stability.sqlite"
VERSION = 2  # of the numbers: a change of what is computed starts anew
KEPT_SECONDS = 180 * 86400  # rows that nobody asked for in this time are dropped
Found = Mapping["Pair", Sequence[Mapping[str, Any]]]


def cache_folder() -> Path:
    """Where results are kept unless a user names another place."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ortho"


class ResultCache:
    """Results on disk; close it, or use it as a context.

    Args:
        folder: made where it is missing.
        options: what the numbers of a layer depend on besides its weights.

    Raises:
        OutputError: the folder cannot be written.
    """

    def __init__(self, folder: Path, options: Callable[[SeriesLayer], object]) -> None:
        self._options = options
        self._identities: dict[tuple[Path, Stamp | None], list[object]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._rows = sqlite3.connect(folder / FILE, timeout=60)
            with self._rows:
                self._rows.execute("CREATE TABLE IF NOT EXISTS result (key TEXT PRIMARY KEY, value TEXT, used REAL)")
                self._rows.execute("DELETE FROM result WHERE used < ?", (time.time() - KEPT_SECONDS,))
        except (OSError, sqlite3.Error) as error:
            raise OutputError(
                f"results cannot be kept: {error}", hint="name another --cache folder, or go without: --no-cache",
                where=str(folder),
            ) from error  # fmt: skip

    def __enter__(self) -> ResultCache:
        return self

    def __exit__(self, *exc: object) -> None:
        self._rows.close()

    def get(
        self, layer: SeriesLayer, entries: Sequence[Entry], pairs: Sequence[Pair]
    ) -> dict[Pair, list[dict[str, Any]]]:
        """What is known of some pairs."""
        found = {}
        for pair in pairs:
            key = self._key(layer, entries, pair)
            row = self._rows.execute("SELECT value FROM result WHERE key = ?", (key,)).fetchone()
            if row is not None:
                found[pair] = [{**each, "kind": layer.kind} for each in json.loads(row[0])]
                self._rows.execute("UPDATE result SET used = ? WHERE key = ?", (time.time(), key))
        self._rows.commit()
        return found

    def put(self, layer: SeriesLayer, entries: Sequence[Entry], found: Found) -> None:
        """Keep what was measured of one layer."""
        now = time.time()
        rows = [(self._key(layer, entries, pair), json.dumps(found[pair]), now) for pair in found]
        with self._rows:
            self._rows.executemany("INSERT OR REPLACE INTO result VALUES (?, ?, ?)", rows)

    def _key(self, layer: SeriesLayer, entries: Sequence[Entry], pair: Pair) -> str:
        content = [
            VERSION, self._options(layer), layer.name, layer.shape,
            [self._stored(layer, entries, place) for place in pair[:2]],
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _stored(self, layer: SeriesLayer, entries: Sequence[Entry], place: int) -> list[object]:
        """A layer in one checkpoint: where its tensors lie in which files."""
        stored = layer.stored[place]
        assert stored is not None
        view = None if stored.view is None else [stored.view.kind, *stored.view.matrix_shape]
        parts = [[*self._file(part), part.offset, part.dtype, part.shape] for part in stored.parts]
        return [view, *parts]

    def _file(self, part: TensorInfo) -> list[object]:
        """By what a file is known: place, size and times; on the hub the name alone, which has the commit.

        The time of modification can be set, as copies that keep it do; that of change cannot.

        Raises:
            CheckpointError: the file is gone, or is not the one whose header was read.
        """
        key = (part.path, part.stamp)
        if key not in self._identities:
            if part.stamp is None:
                self._identities[key] = [str(part.path)]
            else:
                descriptor = open_input(part)
                changed = os.fstat(descriptor).st_ctime_ns
                os.close(descriptor)
                self._identities[key] = [str(part.path.resolve()), *part.stamp[2:], changed]
        return self._identities[key]
