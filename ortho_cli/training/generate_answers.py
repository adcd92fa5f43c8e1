"""Answer the queries of a file, or those that are typed, with a run of the task instruct."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ortho_cli.errors import RecipeError, UsageError
from ortho_cli.tasks.answers import final_answer
from ortho_cli.tasks.generation import bare_model
from ortho_cli.tasks.instruct import InstructTask

from .generate import Maker, Source
from .generate_text import TextMaking

__all__ = ["MAKER", "PART", "AnswerMaking", "read_queries"]

PART = 64  # queries of a part
COLUMNS = ("query", "question", "problem", "instruction", "prompt")


class AnswerMaking(TextMaking):
    """Answers to queries, a line of JSON each.

    Args:
        source: the run.
        asked: the options that were typed.

    Raises:
        UsageError: no `--input` and no `--prompt`, both of them, a file without a query, or an empty one.
        RecipeError: a file that cannot be read.
    """

    unit = ("query", "queries")
    ending = ".jsonl"
    kind = "answers"
    batch = 16

    def __init__(self, source: Source, asked: Mapping[str, Any]) -> None:
        if "input" not in asked and "prompt" not in asked:
            raise UsageError(
                f"run {source.folder.name} answers queries, and there is none",
                hint='give --prompt "1 + 1?", or --input FILE: a query a line, or .jsonl with a column query',
            )
        if "input" in asked and "prompt" in asked:
            raise UsageError("--input and --prompt both bring queries", hint="leave one of them out")
        queries = read_queries(Path(asked["input"])) if "input" in asked else list(asked["prompt"])
        if not all(query.strip() for query in queries):
            raise UsageError("one of the queries is empty", hint="an answer needs a question")
        stem = Path(asked["input"]).stem if "input" in asked else "prompts"
        super().__init__(source, asked, queries, whole=f"{stem}.answers.jsonl", part=PART)

    def text(self, task: InstructTask, model: nn.Module, items: Sequence[str]) -> str:
        """A line for each query: what the model wrote, and what of it is its answer."""
        lines = []
        for first in range(0, len(items), self.batch):
            part = items[first : first + self.batch]
            for query, response in zip(part, task.answer(bare_model(model), part), strict=True):
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


MAKER = Maker(frozenset({"input", "prompt", "checkpoint", "shard", "batch"}), AnswerMaking)
