"""Real sentences that need no download: what SciPy's functions and classes say of themselves, by the part they are in.

The files are parsed, not imported. Whole files are held out to judge by, since neighbours in one file are near-copies;
a sentence that stands in two files is left out. Another SciPy has other sentences.
"""

from __future__ import annotations

import ast
import importlib.util
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal

__all__ = ["PARTS", "read_docstrings"]

PARTS = ("interpolate", "io", "linalg", "optimize", "signal", "sparse", "spatial", "special", "stats")
WORDS = range(5, 21)  # in a paragraph: fewer say nothing ("Compute it."), more are lists
MOST = 200  # of one part in one split, so that statistics, the largest, is not half of all
SHARES = {"train": 0.6, "val": 0.15, "test": 0.25}  # of each part's sentences, about


def read_docstrings(split: Literal["train", "val", "test"]) -> tuple[list[str], list[int], tuple[str, ...]]:
    """One split of the task: which part of SciPy does this sentence come from?

    Args:
        split: `train`, `val` to choose settings by, or `test` to report.

    Returns:
        Texts, the number of each one's part, and the parts' names.

    Cost: a second to parse SciPy, once a process.

    >>> texts, labels, names = read_docstrings("test")
    >>> len(names), len(texts) == len(labels) > 300
    (9, True)
    """
    texts: list[str] = []
    labels: list[int] = []
    for number, part in enumerate(PARTS):
        own = sorted(_splits(_sentences()[part])[split], key=_hash)[:MOST]  # by hash: files come by name
        texts += own
        labels += [number] * len(own)
    return texts, labels, PARTS


@cache
def _sentences() -> dict[str, dict[str, list[str]]]:
    """Of each part, its files and their sentences; each sentence of one file only."""
    spec = importlib.util.find_spec("scipy")
    assert spec is not None and spec.origin is not None  # a dependency of ours
    root = Path(spec.origin).parent
    found: dict[str, dict[str, list[str]]] = {}
    seen: Counter[str] = Counter()
    for part in PARTS:
        files = (path for path in sorted((root / part).rglob("*.py")) if "tests" not in path.parts)
        found[part] = {path.relative_to(root).as_posix(): list(dict.fromkeys(_paragraphs(path))) for path in files}
        seen.update(text for texts in found[part].values() for text in texts)
    return {
        part: {name: [text for text in texts if seen[text] == 1] for name, texts in files.items()}
        for part, files in found.items()
    }


def _splits(files: dict[str, list[str]]) -> dict[str, list[str]]:
    """A part's sentences shared out by whole files, large ones first, each to the split that lacks most."""
    total = sum(map(len, files.values()))
    splits: dict[str, list[str]] = {split: [] for split in SHARES}
    for name in sorted(files, key=lambda name: (-len(files[name]), name)):
        lacking = {split: share * total - len(splits[split]) for split, share in SHARES.items()}
        splits[max(lacking, key=lacking.__getitem__)] += files[name]
    return splits


def _paragraphs(path: Path) -> Iterator[str]:
    """The first paragraph of each docstring of a file."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            text = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
            if len(text.split()) in WORDS:
                yield text


def _hash(text: str) -> int:
    return zlib.crc32(text.encode())
