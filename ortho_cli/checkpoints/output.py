"""Outputs that are complete or absent: checks before any work, a partial beside the target, one rename at the end.

Nothing is overwritten unasked, an input is never an output (links resolved), and what an interrupted run left behind
is swept away by the next one.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ortho_cli.errors import OutputError

from .replaceable import check_replaceable

__all__ = ["atomic", "check_output"]

RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2  # flags of renameat2
SPARE_BYTES = 16 * 2**20  # directory entries, indices and reports beside the tensors


def check_output(output: Path, inputs: Iterable[Path], needed: int, *, force: bool) -> None:
    """Refuse, before any work, an output that exists, is an input, cannot be written or does not fit.

    Args:
        output: what is to be written.
        inputs: every file that will be read.
        needed: bytes of the output.
        force: an existing output may be replaced: a file, or a folder that is empty or a checkpoint.

    Raises:
        OutputError: with what to type instead.
    """
    try:
        exists = output.exists() or output.is_symlink()
        if exists and any(_holds(output, path) for path in inputs if path.exists()):
            raise OutputError(
                f"output {output} is an input, or the folder of one",
                hint="name another file with -o",
                where=str(output),
            )
        if exists and not force:
            raise _exists(output)
        if output.is_dir() and not output.is_symlink():
            check_replaceable(output)
        parent = existing_parent(output)
        with suppress(FileNotFoundError):
            os.lstat(_partial(output))  # fails where the name, which is longer than the output's, is too long
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror or error}", where=str(output)) from error
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
    if output.exists() and os.path.samefile(output, path):
        return True
    places = (path.resolve(), path.parent.resolve() / path.name)  # the file, and the link that leads to it
    return output.is_dir() and any(place.is_relative_to(output.resolve()) for place in places)


def existing_parent(path: Path) -> Path:
    """The nearest folder above `path` that exists.

    Raises:
        OutputError: something above it is a file.
    """
    for parent in path.absolute().parents:
        if parent.is_dir():
            return parent
        if parent.exists():
            raise OutputError(
                f"{parent} is a file, so {path.name} cannot be written below it", hint="name another place with -o"
            )
    raise OutputError(f"no folder above {path} exists", hint="name another place with -o")


@contextmanager
def atomic(output: Path, *, force: bool = True) -> Iterator[Path]:
    """A partial path beside `output` (file or folder) that replaces it when the block ends well, and vanishes if not.

    Args:
        output: the final path; an existing one stays as it is until the last moment.
        force: replace an existing output; without it, what another program puts there meanwhile stays.

    Yields:
        ``.<name>.partial-<pid>-<host>`` in the same folder; create a file or a folder there.

    Raises:
        OutputError: it cannot be written, or exists and `force` is not given.
    """
    output = output.absolute()
    partial = _partial(output)
    missing = [parent for parent in output.parents if not os.path.lexists(parent)]
    done = False
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _sweep(output)
        if not force and os.path.lexists(output):
            raise _exists(output)
        yield partial
        _sync(partial)
        if force:
            _put(partial, output)
        else:
            _put_new(partial, output)
        _sync_entry(output.parent)
        done = True
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror or error}", where=str(output)) from error
    finally:
        _remove(partial)
        for folder in [] if done else missing:  # innermost first; one that something else was put into stays
            with suppress(OSError):
                folder.rmdir()


def _partial(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial-{os.getpid()}-{_host()}")


def _host() -> str:
    """This machine's name: on a disk that several share, only one's own processes can be asked whether they live."""
    return re.sub(r"[^\w.-]", "_", platform.node())


def _put(partial: Path, output: Path) -> None:
    """Give a finished partial the output's name, in one step where the system can swap two names."""
    if not os.path.lexists(output) or not (partial.is_dir() or (output.is_dir() and not output.is_symlink())):
        os.replace(partial, output)
    elif not _exchange(partial, output):  # a folder does not replace, and is not replaced, by a plain rename
        old = output.with_name(f".{output.name}.old-{os.getpid()}-{_host()}")
        os.rename(output, old)
        try:
            os.rename(partial, output)
        except BaseException:
            os.rename(old, output)
            raise
        _remove(old)


def _put_new(partial: Path, output: Path) -> None:
    """Give a finished partial the output's name, which nothing has yet; in one step where the system can."""
    number = _rename(partial, output, RENAME_NOREPLACE)
    if number in (errno.EEXIST, errno.ENOTEMPTY):
        raise _exists(output)
    if number == 0:
        return
    try:  # the call or the file system cannot: a hard link replaces nothing, either, and nor does a folder's rename
        if partial.is_dir():
            if os.path.lexists(output):  # an empty folder would be replaced
                raise _exists(output)
            os.rename(partial, output)
        else:
            os.link(partial, output)
            os.unlink(partial)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR) or os.path.lexists(output):
            raise _exists(output) from error
        os.rename(partial, output)  # a file system without links: a moment's gap is left


def _exists(output: Path) -> OutputError:
    return OutputError(f"output exists: {output}", hint="name another with -o, or overwrite it with --force")


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths atomically; False where the system cannot."""
    return _rename(first, second, RENAME_EXCHANGE) == 0


def _rename(first: Path, second: Path, flags: int) -> int:
    """Linux's `renameat2`: 0, or the number of the error (ENOSYS where there is no such call)."""
    import ctypes

    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return errno.ENOSYS
    at_fdcwd = -100
    done = renameat2(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), flags)
    return 0 if done == 0 else ctypes.get_errno()


def _sweep(output: Path) -> None:
    """Remove what dead processes of this host left for this output: partials, and old folders that were being replaced.

    An old folder whose replacement never came into place is put back instead.
    """
    pattern = re.compile(re.escape(f".{output.name}.") + r"(partial|old)-(\d{1,10})-" + re.escape(_host()))
    for path in sorted(output.parent.iterdir()):
        match = pattern.fullmatch(path.name)
        if match is None or _is_alive(int(match[2])):
            continue
        if match[1] == "old" and not os.path.lexists(output):
            os.rename(path, output)
        else:
            _remove(path)


def _is_alive(pid: int) -> bool:
    """Whether a process other than this one has the number (what has our own was left by an earlier namesake)."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def _remove(path: Path) -> None:
    """Delete a file, link or folder; what another process deletes at the same time is no error."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _sync(partial: Path) -> None:
    """Bring the partial's entries to the disk: a file, or a folder and those in it."""
    folders = [folder for folder, _, _ in os.walk(partial)]
    for entry in folders or [str(partial)]:
        _sync_entry(Path(entry))


def _sync_entry(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
