"""Plan and report: what a verb will write, known from headers alone, and what it did.

Every verb on files is the same two steps: a `plan_*` function that touches no tensor, and `run`, which carries any
plan out. `--dry-run` stops between them.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ortho_cli import __version__
from ortho_cli.checkpoints.header import printable
from ortho_cli.checkpoints.output import atomic, check_output
from ortho_cli.checkpoints.reading import BLOCK_BYTES
from ortho_cli.checkpoints.writer import Piece, file_bytes, write_file
from ortho_cli.errors import CheckpointError

__all__ = ["Advance", "Companion", "OutputFile", "Plan", "Progress", "Report", "provenance", "run"]

Advance = Callable[[int], None]  # told of bytes read or written since the last call
INTERPRETER_BYTES = 240 * 2**20  # Python with torch, before any tensor


class Progress(Protocol):
    """What `run` tells while it works; the command line draws a bar from it."""

    def start(self, total_bytes: int) -> None:
        """The plan's size, once."""

    def advance(self, count: int) -> None:
        """Bytes written since the last call (from any thread)."""


@dataclass(frozen=True)
class OutputFile:
    """One safetensors file of an output; `relative` is its place below the output folder, "" for a single file.

    With a `head`, the verbatim header of a file that is to be restored, pieces stand in its order.
    """

    relative: str
    pieces: Sequence[Piece]
    metadata: dict[str, str]
    head: bytes | None = None


@dataclass(frozen=True)
class Companion:
    """A file made from a finished output before either has its name, and named first: no output is without it.

    `write` is given the output's partial and its own; `needed` is the free space that takes. Where the output's name
    is then taken, the companion stays alone.
    """

    path: Path
    needed: int
    write: Callable[[Path, Path, Advance], None]


@dataclass
class Plan:
    """Everything a verb is about to do.

    `details` holds one dictionary for each changed layer; computed pieces complete theirs while they run. `copies` are
    files taken over as they are, `texts` and `blobs` small files whose content is known. `before` is called when
    nothing has been written yet, to look at inputs whole; `during` surrounds the writing, for what computed pieces
    need while they run; `finish` is called before the last texts are written. `extra_bytes` are those that `before`
    and the companion read.
    """

    command: str
    inputs: list[Path]
    output: Path
    files: list[OutputFile]
    layers: int = 0
    parameters: int = 0
    copies: list[tuple[Path, str]] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    details: list[dict[str, Any]] = field(default_factory=list)
    totals: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    working_bytes: int = 4 * BLOCK_BYTES
    during: Callable[[], AbstractContextManager[None]] = nullcontext
    finish: Callable[[Plan], None] = lambda plan: None
    before: Callable[[Advance], None] = lambda advance: None
    companion: Companion | None = None
    extra_bytes: int = 0

    @property
    def bytes_out(self) -> int:
        """Bytes that will be written."""
        weights = sum(file_bytes(file.pieces, file.metadata, file.head) for file in self.files)
        copies = sum(path.stat().st_size for path, _ in self.copies)
        return weights + copies + sum(map(len, _known(self).values()))

    @property
    def peak_bytes(self) -> int:
        """Estimated peak memory, the interpreter and torch included."""
        return INTERPRETER_BYTES + self.working_bytes

    def report(self, outputs: list[dict[str, Any]], seconds: float, *, dry_run: bool = False) -> Report:
        """The report of this plan, carried out or not."""
        totals = {**self.totals, **({"bytes_out": self.bytes_out, "peak_bytes": self.peak_bytes} if dry_run else {})}
        return Report(
            self.command,
            [path.name for path in self.inputs],
            outputs,
            self.layers,
            self.parameters,
            self.details,
            totals,
            self.notes,
            seconds,
            dry_run,
        )


@dataclass(frozen=True)
class Report:
    """What a verb did; `as_dict` is what `--json` prints (CONTRACTS 1)."""

    command: str
    inputs: list[str]
    outputs: list[dict[str, Any]]
    layers: int
    parameters: int
    details: list[dict[str, Any]]
    totals: dict[str, Any]
    notes: list[str]
    seconds: float
    dry_run: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The report as one JSON object."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "dry_run"}
        return {"schema": 1, "ok": True, **fields, **({"dry_run": True} if self.dry_run else {})}


def run(plan: Plan, *, force: bool = False, dry_run: bool = False, progress: Progress | None = None) -> Report:
    """Carry out a plan: check the output, write everything beside it, then rename once.

    Args:
        plan: from any `plan_*` function.
        force: replace an existing output.
        dry_run: check and report, write nothing.
        progress: told of every byte.

    Raises:
        OutputError: the output exists, is an input, does not fit, or cannot be written; nothing was left behind, but
            perhaps a companion.
        CheckpointError: two files of the output have one name, or an input changed; nothing was left behind.
        NumericsError: a computed weight is not finite; nothing was left behind.
    """
    started = time.perf_counter()
    _check_names(plan)
    inputs = [*plan.inputs, *(source for source, _ in plan.copies)]
    check_output(plan.output, inputs, plan.bytes_out, force=force)
    beside = plan.companion
    if beside is not None:
        check_output(beside.path, inputs, beside.needed, force=force)
    if dry_run:
        return plan.report([], time.perf_counter() - started, dry_run=True)
    if progress is not None:
        progress.start(plan.bytes_out + plan.extra_bytes)
    advance: Advance = progress.advance if progress is not None else lambda count: None
    plan.before(advance)
    with ExitStack() as stack:
        stack.enter_context(plan.during())
        partial = stack.enter_context(atomic(plan.output, force=force))
        own = stack.enter_context(atomic(beside.path, force=force)) if beside is not None else None  # named before it
        single = len(plan.files) == 1 and not plan.files[0].relative and not (plan.copies or plan.texts or plan.blobs)
        if not single:
            partial.mkdir()
        for file in plan.files:
            target = partial / file.relative if file.relative else partial
            target.parent.mkdir(parents=True, exist_ok=True)
            write_file(target, file.pieces, file.metadata, advance=advance, head=file.head)
        for source, relative in plan.copies:
            _copy(source, partial / relative)
            advance(source.stat().st_size)
        plan.finish(plan)
        _check_names(plan)  # the last texts may be known only now
        for relative, content in _known(plan).items():
            _write(partial / relative, content)
        if beside is not None and own is not None:
            beside.write(partial, own, advance)
    return plan.report(_outputs(plan), time.perf_counter() - started)


def _known(plan: Plan) -> dict[str, bytes]:
    return {**{name: text.encode() for name, text in plan.texts.items()}, **plan.blobs}


def _names(plan: Plan) -> list[str]:
    return [*(file.relative for file in plan.files), *(name for _, name in plan.copies), *plan.texts, *plan.blobs]


def _check_names(plan: Plan) -> None:
    """Refuse a plan in which one file of the output would overwrite another."""
    for name, count in Counter(map(os.path.normpath, _names(plan))).items():
        if count > 1:
            raise CheckpointError(
                f"{count} files of the output would have the name {printable(name)!r}",
                hint="rename the weight files (and their index), or give one of them alone",
            )


def _outputs(plan: Plan) -> list[dict[str, Any]]:
    paths = [plan.output / name if name else plan.output for name in _names(plan)]
    paths += [plan.companion.path] if plan.companion is not None else []
    return [{"path": str(path), "bytes": path.stat().st_size} for path in paths]


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    _sync(target)


def _write(target: Path, content: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    _sync(target)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def provenance(
    verb: str,
    inputs: Sequence[str | Path],
    options: dict[str, object],
    *,
    method: dict[str, object] | None = None,
    targets: Sequence[str] = (),
    fingerprint: str | None = None,
) -> dict[str, str]:
    """The `ortho.*` metadata of an output: file names, never folders, and no clock, so equal commands give equal bytes.

    >>> provenance("merge", ["/data/base.safetensors"], {"exact": True})["ortho.command"]
    'ortho merge base.safetensors --exact'
    """
    words = ["ortho", verb, *(Path(str(item)).name or str(item) for item in inputs)]
    for key, value in options.items():
        if value is None or value is False or value == []:
            continue
        flag = "--" + key.replace("_", "-")
        for item in value if isinstance(value, (list, tuple)) else [value]:
            words += [flag] if item is True else [flag, Path(item).name if isinstance(item, Path) else str(item)]
    command = " ".join(words).encode("utf-8", "backslashreplace").decode()  # file names may be no text
    found = {"ortho.version": __version__, "ortho.command": command}
    if method is not None:
        found["ortho.method"] = json.dumps(method, sort_keys=True)
    if targets:
        found["ortho.targets"] = json.dumps(list(targets))
    if fingerprint is not None:
        found["ortho.base_fingerprint"] = fingerprint
    return found
