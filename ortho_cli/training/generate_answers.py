"""Answer the queries of a file with a run of the task instruct.

The file is answered in parts, each a file of its own, so that a killed job goes on and several can share the work; all
answers are put together when the last part is there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ortho_cli.checkpoints.output import atomic
from ortho_cli.errors import RecipeError, UsageError
from ortho_cli.tasks.answers import final_answer
from ortho_cli.tasks.generation import bare_model
from ortho_cli.tasks.instruct import InstructTask

from .evaluate import find_checkpoint, restore_for_judging
from .generate import Made, Maker, Progress, Source
from .generate_folder import OutputFolder
from .generate_pictures import shard_of
from .session import open_session

__all__ = ["MAKER", "PART", "AnswerMaking", "read_queries"]

PART = 64  # queries of a part
BATCH = 16  # queries at a time
COLUMNS = ("query", "question", "problem", "instruction", "prompt")


class AnswerMaking:
    """Answers to a file's queries.

    Args:
        source: the run.
        asked: the options that were typed.

    Raises:
        UsageError: no `--input`, or one without a query.
        RecipeError: a file that cannot be read.
    """

    def __init__(self, source: Source, asked: Mapping[str, Any]) -> None:
        if "input" not in asked and "prompt" not in asked:
            raise UsageError(
                f"run {source.folder.name} answers queries, and there is none",
                hint='give --prompt "1 + 1?", or --input FILE: a query a line, or .jsonl with a column query',
            )
        if "input" in asked and "prompt" in asked:
            raise UsageError("--input and --prompt both bring queries", hint="leave one of them out")
        self.source, self.checkpoint, self.batch = source, asked.get("checkpoint"), asked.get("batch", BATCH)
        self.shard = shard_of(asked.get("shard"))
        self.queries = read_queries(Path(asked["input"])) if "input" in asked else list(asked["prompt"])
        self.whole = f"{Path(asked['input']).stem if 'input' in asked else 'prompts'}.answers.jsonl"
        self.every = {f"{first // PART:06d}.jsonl": first for first in range(0, len(self.queries), PART)}

    def planned(self) -> dict[str, Any]:
        """How many parts there will be, of this shard, and the queries of the input."""
        return {"kind": "answers", "files": len(self._own()), "queries": len(self.queries)}

    def make(self, output: Path, progress: Progress | None) -> Made:
        """Fill the folder.

        Raises:
            CheckpointError: no such checkpoint.
            OutputError: the folder holds what was made otherwise.
        """
        session = open_session(self.source.recipe, judging=True, kept=self.source.folder)
        state = find_checkpoint(self.source.folder, self.checkpoint)
        folder = OutputFolder(output, {"run": self.source.folder.name, "checkpoint": state.name}, self.shard)
        restore_for_judging(session, state)
        task = session.task
        assert isinstance(task, InstructTask)
        parts = {name: self.queries[first : first + PART] for name, first in self._own().items()}
        missing = [name for name, queries in parts.items() if folder.lacks(name, _line(self.every[name], queries))]
        if progress is not None:
            progress.start(len(missing))
        with session.for_judging() as model:
            for name in missing:
                text = self._answered(task, bare_model(model), parts[name])
                line = _line(self.every[name], parts[name])
                folder.write(name, line, lambda path, text=text: path.write_text(text, "utf-8"))  # type: ignore[misc]
                if progress is not None:
                    progress.advance(1)
        also = [folder.manifest.name]
        if folder.finish(list(self.every)):
            with atomic(output / self.whole) as partial:
                partial.write_text("".join((output / name).read_text("utf-8") for name in self.every), "utf-8")
            also.append(self.whole)
        return Made(folder.made, folder.skipped, state.name, also=also)

    def _own(self) -> dict[str, int]:
        """The parts of this shard, and the query that each begins with, counted from 0."""
        names = list(self.every)
        return {
            name: self.every[name] for name in (names if self.shard is None else names[self.shard[0] :: self.shard[1]])
        }

    def _answered(self, task: InstructTask, model: Any, queries: Sequence[str]) -> str:
        """A line for each query: what the model wrote, and what of it is its answer."""
        lines = []
        for first in range(0, len(queries), self.batch):
            part = queries[first : first + self.batch]
            for query, response in zip(part, task.answer(model, part), strict=True):
                line = {"query": query, "response": response, "answer": final_answer(response)}
                lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        return "".join(lines)


def read_queries(path: Path) -> list[str]:
    """The queries of a text file, one a line, or of a .jsonl file's column of them.

    Raises:
        RecipeError: not there, not text, or a line without a query.
        UsageError: there is none.
    """
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"--input {path} cannot be read: {error}") from error
    if not lines:
        raise UsageError(f"--input {path} has no queries")
    if path.suffix != ".jsonl":
        return lines
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise RecipeError(f"{path}:{number}: no JSON: {error.msg}") from error
        column = next((name for name in COLUMNS if isinstance(row, dict) and isinstance(row.get(name), str)), None)
        if column is None:
            raise RecipeError(f"{path}:{number}: no column {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]} with a text")
        found.append(row[column])
    return found


def _line(first: int, queries: Sequence[str]) -> dict[str, Any]:
    """A part's line in the manifest; of a changed input it is another."""
    digest = hashlib.sha256("\n".join(queries).encode("utf-8")).hexdigest()
    return {"first_query": first + 1, "queries": len(queries), "input_sha256": digest}


MAKER = Maker(frozenset({"input", "prompt", "checkpoint", "shard", "batch"}), AnswerMaking)
