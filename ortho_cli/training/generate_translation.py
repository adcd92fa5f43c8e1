"""Translate a text file with a run of the task translate, a sentence a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ortho_cli.errors import UsageError
from ortho_cli.tasks.parallel_text import read_lines
from ortho_cli.tasks.translate import TranslateTask

from .generate import Maker, Source
from .generate_text import TextMaking

__all__ = ["MAKER", "PART", "TranslationMaking"]

PART = 256  # lines of a part: some seconds of work


class TranslationMaking(TextMaking):
    """A file's translation.

    Args:
        source: the run.
        asked: the options that were typed.

    Raises:
        UsageError: no `--input`, or one without a line.
        RecipeError: a file that cannot be read.
    """

    unit = ("line", "lines")
    ending = ".txt"
    batch = 64

    def __init__(self, source: Source, asked: Mapping[str, Any]) -> None:
        if "input" not in asked:
            raise UsageError(
                f"run {source.folder.name} translates text, and there is none", hint="give --input FILE, a line each"
            )
        file = Path(asked["input"])
        lines = read_lines(file)
        if not lines:
            raise UsageError(f"--input {file} has no lines")
        self.languages = source.recipe.data.languages
        super().__init__(source, asked, lines, whole=f"{file.stem}.{self.languages[1]}", part=PART)

    @property
    def kind(self) -> str:
        """From which language into which."""
        return f"translation from {self.languages[0]} into {self.languages[1]}"

    def text(self, task: TranslateTask, model: nn.Module, items: Sequence[str]) -> str:
        """Translations in the lines' order; they are made by length, an empty line is one."""
        found = [""] * len(items)
        order = sorted((place for place, line in enumerate(items) if line.strip()), key=lambda place: len(items[place]))
        for start in range(0, len(order), self.batch):
            places = order[start : start + self.batch]
            for place, text in zip(places, task.translate_text(model, [items[p] for p in places]), strict=True):
                found[place] = " ".join(text.split())
        return "".join(f"{line}\n" for line in found)


MAKER = Maker(frozenset({"input", "checkpoint", "shard", "batch"}), TranslationMaking)
