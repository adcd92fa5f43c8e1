"""Translate a text file with a run of the task translate, a sentence a line.

The file is translated in parts of so many lines, each a file of its own, so that a killed job goes on and several can
share the work; the whole translation is put together when the last part is there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ortho_cli.checkpoints.output import atomic
from ortho_cli.errors import UsageError
from ortho_cli.tasks.parallel_text import read_lines
from ortho_cli.tasks.translate import TranslateTask

from .evaluate import find_checkpoint, restore_for_judging
from .generate import Made, Maker, Progress, Source
from .generate_folder import OutputFolder
from .generate_pictures import shard_of
from .session import open_session

__all__ = ["MAKER", "PART", "TranslationMaking"]

PART = 256  # lines of a part: some seconds of work
BATCH = 64  # sentences at a time


class TranslationMaking:
    """A file's translation.

    Args:
        source: the run.
        asked: the options that were typed.

    Raises:
        UsageError: no `--input`, or one without a line.
        RecipeError: a file that cannot be read.
    """

    def __init__(self, source: Source, asked: Mapping[str, Any]) -> None:
        if "input" not in asked:
            raise UsageError(
                f"run {source.folder.name} translates text, and there is none", hint="give --input FILE, a line each"
            )
        self.source, self.checkpoint, self.batch = source, asked.get("checkpoint"), asked.get("batch", BATCH)
        self.input, self.shard = Path(asked["input"]), shard_of(asked.get("shard"))
        self.lines = read_lines(self.input)
        if not self.lines:
            raise UsageError(f"--input {self.input} has no lines")
        self.whole = f"{self.input.stem}.{source.recipe.data.languages[1]}"
        self.every = {f"{first // PART:06d}.txt": first for first in range(0, len(self.lines), PART)}

    def planned(self) -> dict[str, Any]:
        """How many parts there will be, of this shard, and the lines of the input."""
        first, second = self.source.recipe.data.languages
        return {"kind": f"translation from {first} into {second}", "files": len(self._own()), "lines": len(self.lines)}

    def make(self, output: Path, progress: Progress | None) -> Made:
        """Fill the folder.

        Raises:
            CheckpointError: no such checkpoint.
            OutputError: the folder holds what was made otherwise.
            UsageError: a sentence that is longer than the model can read.
        """
        session = open_session(self.source.recipe, judging=True, kept=self.source.folder)
        state = find_checkpoint(self.source.folder, self.checkpoint)
        folder = OutputFolder(output, {"run": self.source.folder.name, "checkpoint": state.name}, self.shard)
        restore_for_judging(session, state)
        task = session.task
        assert isinstance(task, TranslateTask)
        parts = {name: self.lines[first : first + PART] for name, first in self._own().items()}
        missing = [name for name, lines in parts.items() if folder.lacks(name, _line(self.every[name], lines))]
        if progress is not None:
            progress.start(len(missing))
        with session.for_judging() as model:
            for name in missing:
                text = self._translated(task, model, parts[name])
                line = _line(self.every[name], parts[name])
                folder.write(name, line, lambda path, text=text: _write(path, text))  # type: ignore[misc]
                if progress is not None:
                    progress.advance(1)
        also = [folder.manifest.name]
        if folder.finish(list(self.every)):
            text = [line for name in self.every for line in read_lines(output / name)]
            with atomic(output / self.whole) as partial:
                _write(partial, text)
            also.append(self.whole)
        return Made(folder.made, folder.skipped, state.name, also=also)

    def _own(self) -> dict[str, int]:
        """The parts of this shard, and the line that each begins with, counted from 0."""
        names = list(self.every)
        return {
            name: self.every[name] for name in (names if self.shard is None else names[self.shard[0] :: self.shard[1]])
        }

    def _translated(self, task: TranslateTask, model: nn.Module, lines: Sequence[str]) -> list[str]:
        """Translations in the lines' order; they are made by length, an empty line is one."""
        found = [""] * len(lines)
        order = sorted((place for place, line in enumerate(lines) if line.strip()), key=lambda place: len(lines[place]))
        for start in range(0, len(order), self.batch):
            places = order[start : start + self.batch]
            for place, text in zip(places, task.translate_text(model, [lines[p] for p in places]), strict=True):
                found[place] = " ".join(text.split())
        return found


def _line(first: int, lines: Sequence[str]) -> dict[str, Any]:
    """A part's line in the manifest; of a changed input it is another."""
    digest = hashlib.sha256("\n".join(lines).encode("utf-8")).hexdigest()
    return {"first_line": first + 1, "lines": len(lines), "input_sha256": digest}


def _write(path: Path, lines: Sequence[str]) -> None:
    path.write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8"))


MAKER = Maker(frozenset({"input", "checkpoint", "shard", "batch"}), TranslationMaking)
