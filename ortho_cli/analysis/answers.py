"""What a language model answered, one by one: how many have the right answer, a wrong one, none; and the wrong ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .evaluation import Judge
from .figure import Bars
from .report import Part
from .table import Table

__all__ = ["JUDGE"]

SHOWN = 20  # wrong answers on the page; all items are in items.jsonl
CUT = 160  # letters of a query


def _parts(log: Any) -> Iterator[Part]:
    items = [item for _, item in sorted(log.items.items())]
    if not items:
        return
    counts = {
        "right": sum(item.correct for item in items),
        "wrong": sum(item.answer is not None and not item.correct for item in items),
        "without an answer": sum(item.answer is None for item in items),
    }
    if any(item.lenient is not None for item in items):
        counts["right for the lenient grader alone"] = sum(bool(item.lenient) and not item.correct for item in items)
    yield Bars(
        "answers", "Answers", tuple(counts), tuple(float(count) for count in counts.values()),
        value_label="queries", value_format=".0f",
    )  # fmt: skip
    wrong = [item for item in items if not item.correct]
    if wrong:
        rows = tuple((_cut(item.query), _cut(item.gold or ""), _cut(item.answer or "none")) for item in wrong[:SHOWN])
        note = f"The first {len(rows)} of {len(wrong)}; every response is in items.jsonl."
        yield Table("wrong-answers", "Wrong answers", ("query", "right", "answered"), rows, note=note)


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= CUT else f"{line[: CUT - 3]}..."


def _data(log: Any) -> dict[str, Any]:
    return {"items": len(log.items), "items_file": "items.jsonl"} if log.items else {}


JUDGE: Judge[Any] = Judge(
    own=("accuracy", "accuracy_lenient", "answered_share", "loss", "perplexity"),
    target="",
    collect=lambda task, outputs, labels: task.log,
    metrics={},
    parts=_parts,
    data=_data,
    texts=lambda log: {"items.jsonl": log.text()} if log.items else {},
)
