"""Sharded checkpoints: `*.index.json` lists which file holds which tensor.

An index is data from a stranger: shard names must be plain names inside its folder (no path, no drive, no link out of
it), of the index's own kind, and it must agree with what the shards really hold.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NoReturn

from ortho_cli.errors import CheckpointError

from .header import quoted
from .strict_json import RepeatedKeyError, parse_strict

__all__ = ["MAX_INDEX_BYTES", "check_against_shards", "index_names", "links_out", "read_index"]

MAX_INDEX_BYTES = 10_000_000  # the hub client's own limit
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


def read_index(path: Path) -> tuple[dict[str, str], int | None]:
    """The `weight_map` of an index file (tensor name -> shard name, every shard name safe) and its `total_size`.

    Raises:
        CheckpointError: too large, not an index, or a shard name that leaves the folder or is of another kind.
    """
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            _fail(path, f"index of {path.stat().st_size:,} bytes is over the limit of {MAX_INDEX_BYTES:,}")
        content = parse_strict(path.read_bytes())
    except RepeatedKeyError as error:
        _fail(path, f"{quoted(error.key)} appears twice in the index")
    except (OSError, ValueError) as error:
        _fail(path, f"index cannot be read: {str(error)[:120]}")
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        _fail(path, "index has no weight_map")
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        _fail(path, "index names a shard that is not text")
    for shard in sorted(set(weight_map.values())):
        _check_shard_name(path, shard)
    metadata = content.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total is not None and (isinstance(total, bool) or not isinstance(total, (int, float)) or total != total // 1):
        _fail(path, "the index's total_size is no number of bytes")
    return weight_map, None if total is None else int(total)


def _check_shard_name(path: Path, shard: str) -> None:
    shown = quoted(shard)
    if shard in ("", ".", "..") or {PureWindowsPath(shard).name, PurePosixPath(shard).name} != {shard}:
        _fail(path, f"shard name {shown} is not a plain file name")
    wants_pickle = ".bin.index" in path.name
    is_pickle = shard.endswith(PICKLE_SUFFIXES)
    if wants_pickle != is_pickle or (not is_pickle and not shard.endswith(".safetensors")):
        _fail(path, f"shard {shown} is not of the kind that {path.name} lists")
    target = path.parent / shard
    try:
        found = target.is_file()
    except OSError:  # a name too long to be a file's
        found = False
    if not found:
        _fail(path, f"shard {shown} is missing")
    if links_out(target, path.parent):
        _fail(path, f"shard {shown} is a link out of the folder")


def links_out(path: Path, folder: Path) -> bool:
    """Whether following links from `path`, below `folder`, leads out of it.

    A hub cache links snapshots to blobs: a link may leave the snapshot, but not the folder of its model.
    """
    models = (parent for parent in folder.absolute().parents if _is_hub_folder(parent))
    target = path.resolve()
    return not any(target.is_relative_to(root.resolve()) for root in (folder, *models))


def _is_hub_folder(folder: Path) -> bool:
    return folder.name.startswith("models--") and (folder / "blobs").is_dir()


def check_against_shards(
    path: Path, weight_map: dict[str, str], found: dict[str, str], total_size: int | None, total_bytes: Collection[int]
) -> None:
    """Refuse an index that disagrees with its shards.

    Args:
        path: the index.
        weight_map: tensor name -> shard, as the index says.
        found: tensor name -> shard it really lies in.
        total_size: what the index says all tensors take, if it does.
        total_bytes: what they take, in each way it is counted (tied tensors of pickles once, or each time).

    Raises:
        CheckpointError: naming the first tensor that is elsewhere, or the two sizes.
    """
    for name, shard in weight_map.items():
        if found.get(name) != shard:
            place = f"lies in {quoted(found[name])}" if name in found else "is in no shard"
            _fail(path, f"tensor {quoted(name)} is listed in {quoted(shard)} but {place}")
    extra = sorted(found.keys() - weight_map.keys())
    if extra:
        _fail(path, f"{len(extra)} tensors are in the shards but not in the index, first {quoted(extra[0])}")
    if total_size is not None and total_size not in total_bytes:
        raise CheckpointError(
            f"index says total_size {total_size:,}, the shards hold {max(total_bytes):,} bytes of tensors",
            hint="a shard may be from another model; if the shards are right, delete metadata.total_size",
            where=str(path),
        )


def index_names(stem: str, variant: str | None) -> tuple[str, str]:
    """File names of the safetensors and the pickle index for a weight stem, e.g. `model` or `diffusion_pytorch_model`.

    >>> index_names("diffusion_pytorch_model", "fp16")[0]
    'diffusion_pytorch_model.safetensors.index.fp16.json'
    """
    tail = f".{variant}.json" if variant else ".json"
    return f"{stem}.safetensors.index{tail}", f"{'pytorch_model' if stem == 'model' else stem}.bin.index{tail}"


def _fail(path: Path, reason: str) -> NoReturn:
    raise CheckpointError(reason, where=str(path))
