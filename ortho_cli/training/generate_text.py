"""Text that a run makes of the lines of another, part by part.

Each part is a file of its own, so that a killed job goes on and several can share the work; the whole is put together
when the last part is there.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from ortho_cli.checkpoints.output import atomic

from .evaluate import find_checkpoint, restore_for_judging
from .generate import Made, Progress, Source
from .generate_folder import OutputFolder
from .generate_pictures import shard_of
from .session import open_session

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["TextMaking"]


class TextMaking(ABC):
    """What a task's own way of making text is on top of.

    Args:
        source: the run.
        asked: the options that were typed.
        items: the lines that text is made of, in order.
        whole: the name of the file that all parts make up.
        part: items of a part.
    """

    unit: ClassVar[tuple[str, str]]
    """What one item is called in manifests, and several."""
    ending: ClassVar[str]
    """Of the parts' files."""
    batch: int
    """Items at a time, unless `--batch` says otherwise."""

    def __init__(
        self, source: Source, asked: Mapping[str, Any], items: Sequence[str], *, whole: str, part: int
    ) -> None:
        self.source, self.checkpoint, self.shard = source, asked.get("checkpoint"), shard_of(asked.get("shard"))
        self.batch = asked.get("batch", self.batch)
        self.count, self.whole = len(items), whole
        self.parts = {
            f"{number:06d}{self.ending}": (first, items[first : first + part])
            for number, first in enumerate(range(0, len(items), part))
        }

    @property
    @abstractmethod
    def kind(self) -> str:
        """What comes of it, in a word or two."""

    @abstractmethod
    def text(self, task: Any, model: nn.Module, items: Sequence[str]) -> str:
        """What the run makes of some items: the content of a part's file."""

    def planned(self) -> dict[str, Any]:
        """How many parts there will be, of this shard, and how much the input has."""
        return {"kind": self.kind, "files": len(self._own()), self.unit[1]: self.count}

    def make(self, output: Path, progress: Progress | None) -> Made:
        """Fill the folder.

        Raises:
            CheckpointError: no such checkpoint.
            OutputError: the folder holds what was made otherwise.
            UsageError: an item that is longer than the model can read.
        """
        session = open_session(self.source.recipe, judging=True, kept=self.source.folder)
        state = find_checkpoint(self.source.folder, self.checkpoint)
        folder = OutputFolder(output, {"run": self.source.folder.name, "checkpoint": state.name}, self.shard)
        restore_for_judging(session, state)
        missing = [name for name in self._own() if folder.lacks(name, self._line(name))]
        if progress is not None:
            progress.start(len(missing))
        with session.for_judging() as model:
            for name in missing:
                made = self.text(session.task, model, self.parts[name][1]).encode("utf-8")
                folder.write(name, self._line(name), lambda path, made=made: path.write_bytes(made))  # type: ignore[misc]
                if progress is not None:
                    progress.advance(1)
        also = [folder.manifest.name]
        if folder.finish(list(self.parts)):
            with atomic(output / self.whole) as partial:
                partial.write_bytes(b"".join((output / name).read_bytes() for name in self.parts))
            also.append(self.whole)
        return Made(folder.made, folder.skipped, state.name, also=also)

    def _own(self) -> list[str]:
        """The parts of this shard."""
        index, count = self.shard or (0, 1)
        return list(self.parts)[index::count]

    def _line(self, name: str) -> dict[str, Any]:
        """A part's line in the manifest; of a changed input it is another."""
        first, items = self.parts[name]
        digest = hashlib.sha256("\n".join(items).encode("utf-8")).hexdigest()
        one, several = self.unit
        return {f"first_{one}": first + 1, several: len(items), "input_sha256": digest}
