"""What a run says of itself: `metrics.jsonl`, which a resumed run repeats, and `timing.jsonl`, which it cannot.

One JSON object a line, flushed as written. On resume both are cut back to the step that is resumed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from ortho_cli.analysis.run_folder import read_lines

__all__ = ["JsonLines", "finite", "read_lines"]


class JsonLines:
    """An append-only file of JSON objects, each with its ``step``.

    Args:
        path: created if missing.
        keep_until: cut lines of later steps away first (None: keep all).
    """

    def __init__(self, path: Path, *, keep_until: int | None = None) -> None:
        self.path = path
        if keep_until is not None and path.exists():
            _cut(path, keep_until)
        self._file: IO[str] = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one object; floats read back bit for bit, and those that JSON lacks (inf, nan) are null."""
        self._file.write(json.dumps(finite(values), allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Bring what was written to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush to disk and close."""
        if not self._file.closed:
            self.sync()
            self._file.close()


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values with None for numbers that are not finite.

    >>> finite({"loss": 0.5, "condition": float("inf")})
    {'loss': 0.5, 'condition': None}
    """
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }


def _cut(path: Path, step: int) -> None:
    kept = [json.dumps(values) + "\n" for values in read_lines(path) if values["step"] <= step]
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.write_text("".join(kept), "utf-8")
    os.replace(partial, path)
