"""A report in a folder of its own, which appears whole or not at all; `--force` replaces reports, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ortho_cli.checkpoints.header import quoted
from ortho_cli.checkpoints.output import atomic, check_output
from ortho_cli.errors import OutputError

from .report import FIGURES, FORMATS, Report

__all__ = ["check_folder", "write_folder"]

NEEDED = 16 * 2**20  # bytes; most of it is plotly, five megabytes a page
OURS = {f".{kind}" for kind in (*FORMATS, "md", "jsonl")}


def check_folder(folder: Path, inputs: Iterable[Path], mark: str, *, force: bool) -> None:
    """Refuse, before any work, a folder that exists or cannot be written.

    Args:
        folder: to write.
        inputs: what is read, and must not be replaced.
        mark: the file by which an earlier report is known.
        force: an earlier report may be replaced.

    Raises:
        OutputError: with what to type instead.
    """
    if not (force and folder.is_dir()):
        check_output(folder, inputs, NEEDED, force=False)
        return
    found = sorted(folder.rglob("*"))
    if found and not (folder / mark).is_file():
        raise OutputError(
            f"folder {folder} holds no {mark}, so it is no earlier report and --force does not replace it",
            hint="name another with -o",
        )
    for path in found:
        name = path.relative_to(folder)
        is_ours = path.suffix in OURS and name.parent.as_posix() in (".", FIGURES)
        if not (is_ours and path.is_file()) and name.as_posix() != FIGURES:
            raise OutputError(
                f"folder {folder} also holds {quoted(name.as_posix())}, which is no part of a report, so --force does "
                "not replace it",
                hint="name another with -o",
            )


def write_folder(report: Report, folder: Path, formats: Sequence[str], *, force: bool = False) -> list[dict[str, Any]]:
    """Write a report as a new folder.

    Returns:
        The files, as `{"path", "bytes"}`.

    Raises:
        OutputError: it exists, or cannot be written.
    """
    names = list(report.files(formats))
    with atomic(folder, force=force) as partial:
        partial.mkdir()
        report.write(partial, formats)
    return [{"path": str(folder / name), "bytes": (folder / name).stat().st_size} for name in names]
