"""A series of revisions of one repository on the hub: branches or tags such as `step1000`, as Pythia has 154 of.

Of each revision the header is read, and later the bytes of the tensors that are asked for: ranges of the files, so that
nothing else is downloaded and nothing is kept. What the hub cache holds already, and pickles, which have no header to
read ranges by, are opened as files. `HF_HUB_OFFLINE=1` answers from the cache alone.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ortho_cli.errors import CheckpointError, UsageError

from .checkpoint import Checkpoint, WeightFile
from .header import MAX_HEADER_BYTES, parse_header, printable
from .hub import choose_files, hub_failures, parse_hub_id, reason_of
from .series import Entry, in_order, open_entry, step_in_name
from .tensors import TORCH_DTYPES, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["open_revisions"]


def open_revisions(source: str, pattern: str) -> list[Entry]:
    """Open the revisions of a repository whose names fit a pattern.

    Args:
        source: `org/name`.
        pattern: a glob over branches and tags, as `step*`.

    Returns:
        By the steps in their names.

    Raises:
        UsageError: no hub id, revisions without numbers, or two of one step.
        CheckpointError: the hub or the cache has none of them.

    Cost: a few kilobytes each.
    """
    hub = parse_hub_id(source)
    if hub is None or hub.revision is not None or hub.file is not None:
        raise UsageError(
            f"--revisions asks for a repository, found {printable(source)}", hint="as in EleutherAI/pythia-70m"
        )
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    try:
        revisions = _cached_refs(hub.repo) if offline else _refs(hub.repo)
        chosen = {name: commit for name, commit in revisions.items() if fnmatch.fnmatchcase(name, pattern)}
        if not chosen:
            where = "the hub cache holds" if offline else "the hub has"
            raise CheckpointError(
                f"{where} {len(revisions)} revisions of {hub.repo}, none of which fits {printable(pattern)}",
                hint=f"there are: {', '.join(sorted(revisions)[:6])}" if revisions else "unset HF_HUB_OFFLINE to fetch",
            )
        for name in chosen:
            if step_in_name(name) is None:
                raise UsageError(f"revision {printable(name)} has no number: a series is ordered by steps")
        entries = [_open(hub.repo, name, commit, offline=offline) for name, commit in chosen.items()]
    except hub_failures() as error:
        raise CheckpointError(
            f"{hub} cannot be read: {reason_of(error)}",
            hint="check the name and your token (`ortho doctor`), or set HF_HUB_OFFLINE=1 for what the cache holds",
        ) from error
    return in_order(entries)


def _refs(repo: str) -> dict[str, str]:
    """Branches and tags -> commit, as the hub has them now."""
    from huggingface_hub import HfApi

    refs = HfApi().list_repo_refs(repo)
    return {ref.name: ref.target_commit for ref in (*refs.branches, *refs.tags)}


def _cached_refs(repo: str) -> dict[str, str]:
    """Branches and tags -> commit, of those that the cache holds."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model") / "refs"
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()] if folder.is_dir() else []
    return {path.relative_to(folder).as_posix(): path.read_text("utf-8").strip() for path in files}


def _open(repo: str, name: str, commit: str, *, offline: bool) -> Entry:
    local = None if offline else _remote(repo, commit)
    if local is not None:
        return Entry(step_in_name(name), printable(name), local, _read_range)
    entry = open_entry(f"{repo}@{commit}")
    return Entry(step_in_name(name), printable(name), entry.checkpoint)


def _remote(repo: str, commit: str) -> Checkpoint | None:
    """The headers of a revision's safetensors; None where files are to be opened instead."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    names = choose_files(HfApi().list_repo_files(repo, revision=commit))
    weights = [name for name in names if name.endswith(".safetensors")]
    if not weights or all(isinstance(try_to_load_from_cache(repo, name, revision=commit), str) for name in weights):
        return None
    files, tensors = [], dict[str, TensorInfo]()
    for name in weights:
        path = Path(f"{repo}@{commit}") / name
        size = int(_files().info(path.as_posix())["size"])
        length = int.from_bytes(_range(path, 0, 8), "little")
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(f"not a safetensors file: a header of {length:,} bytes", where=str(path))
        header = parse_header(_range(path, 8, 8 + length), path, 8 + length, size)
        tensors |= header.tensors
        files.append(WeightFile(path, name, "", "safetensors", header.metadata, tuple(header.tensors)))
    config: Mapping[str, Any] = {}
    return Checkpoint(repo, Path(repo), "folder", tuple(files), tensors, dict(config))


def _read_range(info: TensorInfo) -> Tensor:
    """A tensor's bytes and no others."""
    import torch

    try:
        content = _range(info.path, info.offset, info.offset + info.nbytes)
    except hub_failures() as error:
        raise CheckpointError(f"cannot be read: {reason_of(error)}", where=str(info.path)) from error
    if len(content) != info.nbytes:
        raise CheckpointError(f"file ended inside tensor {info.name!r}", where=str(info.path))
    return torch.frombuffer(bytearray(content), dtype=getattr(torch, TORCH_DTYPES[info.dtype])).view(info.shape)


def _range(path: Path, start: int, stop: int) -> bytes:
    content = _files().cat_file(path.as_posix(), start=start, end=stop, cache_type="none")  # nothing read ahead
    assert isinstance(content, bytes)
    return content


@lru_cache(maxsize=1)
def _files() -> Any:
    from huggingface_hub import HfFileSystem

    return HfFileSystem()
