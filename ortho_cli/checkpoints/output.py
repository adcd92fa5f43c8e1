"""Outputs that are complete or absent: checks before any work, a partial beside the target, one rename at the end.

Nothing is overwritten unasked, an input is never an output (links resolved), and what an interrupted run left behind
is swept away by the next one.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ortho_cli.errors import OutputError

__all__ = ["atomic", "check_output"]

SPARE_BYTES = 16 * 2**20  # directory entries, indices and reports beside the tensors


def check_output(output: Path, inputs: Iterable[Path], needed: int, *, force: bool) -> None:
    """Refuse, before any work, an output that exists, is an input, cannot be written or does not fit.

    Raises:
        OutputError: with what to type instead.
    """
    for path in inputs:
        if output.exists() and path.exists() and _holds(output, path):
            raise OutputError(
                f"output {output} is an input, or the folder of one", hint="name another file with -o", where=str(output)
            )
    if (output.exists() or output.is_symlink()) and not force:
        raise OutputError(f"output exists: {output}", hint="name another with -o, or overwrite it with --force")
    parent = existing_parent(output)
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write into {parent}: {error.strerror or error}", hint="name another place with -o"
        ) from error
    free = shutil.disk_usage(parent).free
    if needed + SPARE_BYTES > free:
        raise OutputError(
            f"not enough space in {parent}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free",
            hint="free some, or name another disk with -o",
        )


def _holds(output: Path, path: Path) -> bool:
    """Whether replacing `output` would touch the input `path`, links and hard links included."""
    if os.path.samefile(output, path):
        return True
    return output.is_dir() and path.resolve().is_relative_to(output.resolve())


def existing_parent(path: Path) -> Path:
    """The nearest folder above `path` that exists.

    Raises:
        OutputError: something above it is a file.
    """
    for parent in path.absolute().parents:
        if parent.is_dir():
            return parent
        if parent.exists():
            raise OutputError(f"{parent} is a file, so {path.name} cannot be written below it")
    raise OutputError(f"no folder above {path} exists")


@contextmanager
def atomic(output: Path) -> Iterator[Path]:
    """A partial path beside `output` (file or folder) that replaces it when the block ends well, and vanishes if not.

    Args:
        output: the final path; an existing one stays as it is until the last moment.

    Yields:
        ``.<name>.partial-<pid>`` in the same folder; create a file or a folder there.
    """
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    _sweep(output)
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    try:
        yield partial
        _sync_folder(partial)
        if output.is_dir() and not output.is_symlink():
            _replace_folder(partial, output)
        else:
            os.replace(partial, output)
        _sync_folder(output.parent)
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror or error}", where=str(output)) from error
    finally:
        _remove(partial)


def _replace_folder(partial: Path, output: Path) -> None:
    """Put a finished folder in the place of an old one, in one step where the system can swap two names."""
    if not _exchange(partial, output):
        old = output.with_name(f".{output.name}.old-{os.getpid()}")
        os.rename(output, old)
        os.rename(partial, output)
        _remove(old)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths atomically (Linux `renameat2` with RENAME_EXCHANGE); False where the system cannot."""
    import ctypes

    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_fdcwd, rename_exchange = -100, 2
    return bool(renameat2(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange) == 0)


def _sweep(output: Path) -> None:
    """Remove partials that dead processes left for this output."""
    pattern = re.compile(re.escape(f".{output.name}.partial-") + r"(\d+)")
    for path in output.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match and not _is_alive(int(match[1])):
            _remove(path)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError):
            path.unlink()


def _sync_folder(path: Path) -> None:
    """Make a rename (or a folder's entries) survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
