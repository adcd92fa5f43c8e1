"""The folder that things are made into: what is there already is kept, so that a killed job goes on.

`manifest.jsonl` begins with the settings, which decide every file, and has a line for each file. A folder that was made
with other settings is refused. Shards of one job write a manifest each, so that no two processes write one file; when
the last of them is done, `manifest.jsonl` has the lines of all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ortho_cli.checkpoints.output import atomic
from ortho_cli.errors import OutputError

from .log import read_lines

__all__ = ["MANIFEST", "OutputFolder", "read_manifests"]

MANIFEST = "manifest.jsonl"
SHARDS = "manifest-*-of-*.jsonl"

Write = Callable[[Path], None]


class OutputFolder:
    """A folder that is filled file by file.

    Args:
        folder: made where it is not there.
        head: the settings; what may differ from call to call (how many, which shard) is no part of them.
        shard: (index, number of shards), counted from 0; None: all of it.

    Raises:
        OutputError: it holds what was made otherwise, or other things.
    """

    def __init__(self, folder: Path, head: Mapping[str, Any], shard: tuple[int, int] | None = None) -> None:
        self.folder = folder
        self.manifest = folder / (MANIFEST if shard is None else f"manifest-{shard[0]:03d}-of-{shard[1]:03d}.jsonl")
        self.made: list[str] = []
        self.skipped: list[str] = []
        _check(folder, head)
        self._told = {line.pop("file"): line for line in read_manifests(folder)[1]}
        if not self.manifest.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with atomic(self.manifest) as partial:
                partial.write_text(json.dumps(head) + "\n", "utf-8")
        else:
            _mend(self.manifest)

    def lacks(self, name: str, line: Mapping[str, Any]) -> bool:
        """Whether a file is still to be made; one that is there is skipped, with its line where none was written.

        Raises:
            OutputError: the file was made of something else.
        """
        if not (self.folder / name).exists():
            return True
        _check_same(f"{self.folder / name} was made otherwise", self._told.get(name, {}), line)
        self.skipped.append(name)
        self._tell(name, line)
        return False

    def write(self, name: str, line: Mapping[str, Any], write: Write) -> None:
        """Make a file, whole or not at all, and add its line to the manifest."""
        with atomic(self.folder / name) as partial:
            write(partial)
        self.made.append(name)
        self._tell(name, line)

    def _tell(self, name: str, line: Mapping[str, Any]) -> None:
        if name in self._told:
            return
        with self.manifest.open("a", encoding="utf-8") as manifest:
            manifest.write(json.dumps({"file": name, **line}) + "\n")
        self._told[name] = dict(line)

    def finish(self, names: Sequence[str]) -> bool:
        """Whether all files of a job are there, of whichever shard; then `manifest.jsonl` has a line for each."""
        if not all((self.folder / name).exists() for name in names):
            return False
        heads, lines = read_manifests(self.folder)
        if self.manifest.name != MANIFEST and {line["file"] for line in lines} >= set(names):
            with atomic(self.folder / MANIFEST) as partial:
                partial.write_text("".join(json.dumps(line) + "\n" for line in (heads[0], *lines)), "utf-8")
        return True


def read_manifests(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The settings at the head of each manifest of a folder, and a line for each file, in order."""
    heads: list[dict[str, Any]] = []
    lines: dict[str, dict[str, Any]] = {}
    for path in [folder / MANIFEST, *sorted(folder.glob(SHARDS))]:
        head, *rest = list(read_lines(path)) if path.is_file() else [{}]
        heads += [head] if head else []
        lines |= {str(line["file"]): line for line in rest}
    return heads, [lines[name] for name in sorted(lines)]


def _check(folder: Path, head: Mapping[str, Any]) -> None:
    heads, _ = read_manifests(folder)
    for found in heads:
        _check_same(f"{folder} holds what was made otherwise", found, head)
    if not heads and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} exists and holds no {MANIFEST}", hint="name a new or an empty folder")


def _check_same(what: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse the first of the wanted values that was another; where nothing was written down, nothing is known."""
    for key, value in json.loads(json.dumps(wanted)).items() if found else ():
        if found.get(key) != value:
            raise OutputError(f"{what}: {key} was {found.get(key)!r}, now {value!r}", hint="name another folder")


def _mend(path: Path) -> None:
    """Cut away an unfinished last line, which a killed job may leave."""
    text = path.read_bytes()
    if not text.endswith(b"\n"):
        with atomic(path) as partial:
            partial.write_bytes(text[: text.rfind(b"\n") + 1])
