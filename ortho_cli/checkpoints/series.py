"""A series: the checkpoints that one training left behind, in the order of their steps; headers only.

It is a run of `ortho train`, a folder whose children are checkpoints, a glob, several of these, or revisions of a
repository on the hub (`hub_series.py`). The order is that of `state.json`'s step, else of the step in the name.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from ortho_cli.errors import CheckpointError, UsageError

from .checkpoint import Checkpoint
from .header import printable
from .store import STEMS, WEIGHT_SUFFIXES, open_checkpoint, read_json
from .tensors import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Entry", "in_order", "open_entry", "open_series", "read_stored", "step_in_name"]

MARKS = (
    "model_index.json", "adapter_config.json", "pytorch_model.bin",
    *(f"{stem}.{end}" for stem in STEMS for end in ("safetensors", "safetensors.index.json", "bin")),
)  # fmt: skip
# What trainers count, the finest first; with the number right behind it.
COUNTED = tuple(rf"(?<![a-z]){word}[-_=]?(\d+)" for word in ("steps?", "iter(?:ation)?", "checkpoint", "epoch"))
RUN_STEPS = "checkpoints"  # the folder of a run that holds its states, each `step-000500`


def read_stored(info: TensorInfo) -> Tensor:
    """A tensor of a file on this machine, in memory of its own."""
    from .reading import TensorReader

    with TensorReader() as reader:
        return reader.read_copy(info)


@dataclass(frozen=True)
class Entry:
    """One checkpoint of a series.

    Attributes:
        step: of the training; None for a reference that names none.
        name: as a report calls it, without the path that led to it.
        checkpoint: its header.
        read: reads one of its tensors, in memory of its own; from any thread.
    """

    step: int | None
    name: str
    checkpoint: Checkpoint
    read: Callable[[TensorInfo], Tensor] = read_stored


def open_series(sources: Sequence[str]) -> list[Entry]:
    """Open every checkpoint of a series.

    Args:
        sources: each a checkpoint, a run, a folder of checkpoints, or a glob of these.

    Returns:
        The checkpoints, by step.

    Raises:
        UsageError: one without a number, two of the same step.
        CheckpointError: nothing there, or a checkpoint that cannot be read.

    Cost: one read of each header.
    """
    entries = []
    for place in dict.fromkeys(place for source in sources for place in _places(source)):
        entry = open_entry(place)
        if entry.step is None:
            raise UsageError(
                f"{printable(str(place))} has no number in its name, and no state.json that tells its step",
                hint="a series is ordered by steps: name its checkpoints so, e.g. step-000500.safetensors",
            )
        entries.append(entry)
    return in_order(entries)


def in_order(entries: Sequence[Entry]) -> list[Entry]:
    """Sort checkpoints by their steps.

    Raises:
        UsageError: two of one step.
    """
    found = sorted(entries, key=lambda entry: (entry.step or 0, entry.name))
    for first, second in pairwise(found):
        if first.step == second.step:
            raise UsageError(
                f"{printable(first.name)} and {printable(second.name)} are both of step {first.step}",
                hint="name the checkpoints of one training",
            )
    return found


def open_entry(place: str | Path) -> Entry:
    """Open one checkpoint, and find its step where something tells it."""
    checkpoint = open_checkpoint(place)
    path = Path(place)
    name = path.name if step_in_name(path.stem) is not None or path.is_dir() else f"{path.parent.name}/{path.name}"
    return Entry(_step(path), printable(name), checkpoint)


def step_in_name(name: str) -> int | None:
    """The number behind `step`, `iter`, `checkpoint` or `epoch` in a name, else its last one.

    >>> step_in_name("step1000-tokens4B"), step_in_name("resnet50-v2.1"), step_in_name("best")
    (1000, 1, None)
    """
    for pattern in (*COUNTED, r"(\d+)"):
        if found := re.findall(pattern, name, re.IGNORECASE):
            return int(found[-1])
    return None


def _step(path: Path) -> int | None:
    """What `state.json` says, else the name, of a file that its folder has in its name (`step-5/model.safetensors`)."""
    folder = path if path.is_dir() else path.parent
    state = folder / "state.json"
    own = path.is_dir() or path.name in MARKS
    if own and state.is_file():
        step = read_json(state).get("step")
        if isinstance(step, int) and not isinstance(step, bool):
            return step
    number = step_in_name(path.name if path.is_dir() else path.stem)
    return step_in_name(folder.name) if number is None and own else number


def _places(source: str) -> Iterator[str]:
    """The checkpoints that an argument means."""
    path = Path(os.path.expanduser(source))
    if not path.exists() and glob.has_magic(source):
        matched = sorted(glob.glob(os.path.expanduser(source), recursive=True))
        if not matched:
            raise CheckpointError(f"nothing matches {printable(source)}")
        for each in matched:
            yield from _places(each)
    elif path.is_dir() and not _is_checkpoint(path):
        yield from _children(path)
    else:  # a file, a folder that is one checkpoint, or a hub id
        yield source


def _children(folder: Path) -> list[str]:
    """The checkpoints in a folder; in a run's, the states it has saved."""
    saved = folder / RUN_STEPS
    children = sorted(saved.glob("step-*") if saved.is_dir() else folder.iterdir())
    found = [
        str(child)
        for child in children
        if not child.name.startswith(".")
        and (_is_checkpoint(child) or _holds_one(child) if child.is_dir() else child.suffix in WEIGHT_SUFFIXES)
    ]
    if not found:
        raise CheckpointError(
            f"folder {printable(folder.name)} holds no checkpoints",
            hint="expected a run of `ortho train`, or files and folders of weights with a step in their names",
            where=str(folder),
        )
    return found


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder is one checkpoint: it holds what a library saves one as."""
    return any((folder / mark).is_file() for mark in MARKS)


def _holds_one(folder: Path) -> bool:
    """Whether a folder holds one weight file, whatever its name."""
    return sum(path.suffix in WEIGHT_SUFFIXES for path in folder.iterdir()) == 1
