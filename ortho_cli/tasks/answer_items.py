"""Every single answer of an evaluation, graded, in a log that a killed evaluation goes on from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

__all__ = ["Item", "ItemLog"]


@dataclass(frozen=True)
class Item:
    """One answered query.

    Attributes:
        index: its place in what is judged on.
        query: as the data has it, without a template.
        gold: the answer that is right; None where the data's response ends with none.
        response: what the model wrote.
        answer: what of it is taken for its answer; None: it gave none.
        correct: whether that means the gold one.
        lenient: what a published grader says; None where none is asked.
    """

    index: int
    query: str
    gold: str | None
    response: str
    answer: str | None
    correct: bool
    lenient: bool | None = None


class ItemLog:
    """A file of items, one a line, appended as they are made; a half-written last line is dropped and made again.

    Args:
        path: of the file; None: items are kept in memory only.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.items: dict[int, Item] = {}
        if path is None or not path.is_file():
            return
        names = {each.name for each in fields(Item)}
        kept = []
        for line in path.read_text("utf-8").splitlines():
            try:
                found = json.loads(line)
            except json.JSONDecodeError:  # where it was killed
                continue
            if isinstance(found, dict) and found.keys() == names:
                self.items[found["index"]] = Item(**found)
                kept.append(line)
        path.write_text("".join(f"{line}\n" for line in kept), "utf-8")

    def add(self, items: list[Item]) -> None:
        """Keep some more, on disk at once."""
        self.items |= {item.index: item for item in items}
        if self.path is not None and items:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in items)

    def text(self) -> str:
        """All items in the data's order, one a line."""
        return "".join(json.dumps(asdict(item), ensure_ascii=False) + "\n" for _, item in sorted(self.items.items()))
