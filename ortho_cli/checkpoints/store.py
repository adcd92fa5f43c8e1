"""Open any checkpoint as one mapping of tensor names to byte ranges; no tensor is read.

A checkpoint argument is a file (`.safetensors`, `.ckpt`, `.bin`, `.pt`, `.pth`), a sharded index or the folder that
holds one, a transformers, diffusers or adapter folder, or a hub id `org/name[@revision][:file]`. In a pipeline of
several components tensor names carry the component: `unet.conv_in.weight`.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from ortho_cli.errors import CheckpointError

from .checkpoint import Checkpoint, WeightFile
from .header import printable, quoted, read_header
from .index import check_against_shards, index_names, read_index
from .strict_json import RepeatedKeyError, parse_strict
from .tensors import TensorInfo

__all__ = [
    "PICKLE_SUFFIXES", "STEMS", "WEIGHT_COMPONENTS", "WEIGHT_SUFFIXES", "Checkpoint", "WeightFile", "open_checkpoint",
    "read_json",
]  # fmt: skip

PICKLE_SUFFIXES = (".ckpt", ".bin", ".pt", ".pth")
WEIGHT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
STEMS = ("model", "diffusion_pytorch_model", "adapter_model", "pytorch_lora_weights")
WEIGHTS_BELOW = ("*/model.safetensors", "checkpoints/*/model.safetensors")  # of an export, of a run
NAMED_BELOW = 3
MAX_JSON_BYTES = 10_000_000
# Folders by which a pipeline is known even without its model_index.json.
WEIGHT_COMPONENTS = (
    "unet", "transformer", "transformer_2", "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "prior",
    "decoder", "controlnet", "image_encoder", "safety_checker",
)  # fmt: skip


def open_checkpoint(source: str | Path, *, variant: str | None = None) -> Checkpoint:
    """Open a checkpoint lazily: headers are read and checked, tensors are not.

    Args:
        source: a file, a folder, an index file, or a hub id ``org/name[@revision][:file]``.
        variant: which variant of a folder's weights to take (``fp16``); by default the plain one, else the only one.

    Raises:
        CheckpointError: not found, unreadable, malformed, or ambiguous; the message says which file and why.

    Cost: one read of each header; a 4 GB file opens in milliseconds.

    >>> open_checkpoint("no/such/file.safetensors")
    Traceback (most recent call last):
    ortho_cli.errors.CheckpointError: no such file or folder: no/such/file.safetensors
    """
    try:
        return _open(str(source), variant)
    except OSError as error:  # no permission, a name too long, a folder that vanished
        where = printable(str(error.filename or source))
        raise CheckpointError(f"cannot be read: {error.strerror or error}", where=where) from error


def _open(text: str, variant: str | None) -> Checkpoint:
    path = Path(os.path.expanduser(text))
    if not path.exists():
        from .hub import fetch, parse_hub_id

        hub = parse_hub_id(text)
        if hub is None:
            raise CheckpointError(
                f"no such file or folder: {printable(text)}",
                hint="a hub id is written org/name, org/name@revision or org/name:file.safetensors",
            )
        path = fetch(hub)
    if path.is_dir():
        return _open_folder(text, path, variant)
    if path.name.endswith(".json") and ".index" in path.name:
        return _open_shards(text, path.parent, path)
    file = _open_file(path, "", "")
    return Checkpoint(text, path, "file", (file[0],), file[1], notes=file[2])


Opened = tuple[WeightFile, dict[str, TensorInfo], tuple[str, ...]]


def _open_file(path: Path, relative: str, component: str) -> Opened:
    """Read one weight file's header, by what the file is and not by its name alone."""
    if not path.is_file():
        raise CheckpointError(f"not a file: {printable(str(path))}")
    if path.suffix in PICKLE_SUFFIXES:
        from .pickles import read_pickle

        contents = read_pickle(path)
        tensors, metadata, notes, kind = contents.tensors, dict[str, str](), contents.notes, "pickle"
    elif path.suffix == ".safetensors":
        header = read_header(path)
        tensors, metadata, notes, kind = header.tensors, header.metadata, (), "safetensors"
    else:
        raise CheckpointError(
            f"cannot tell what {printable(path.name)} is: its name ends in none of {' '.join(WEIGHT_SUFFIXES)}",
            where=str(path),
        )
    if component:
        tensors = {f"{component}.{name}": replace(info, name=f"{component}.{name}") for name, info in tensors.items()}
    return WeightFile(path, relative, component, kind, metadata, tuple(tensors)), dict(tensors), tuple(notes)


def _open_folder(source: str, root: Path, variant: str | None) -> Checkpoint:
    if (root / "model_index.json").is_file():
        return _open_pipeline(source, root, variant)
    single = _open_component(source, root, variant)
    if single is not None:
        return single
    if any((root / child).is_dir() for child in WEIGHT_COMPONENTS):
        return _open_pipeline(source, root, variant)
    below = {path.parent for pattern in WEIGHTS_BELOW for path in root.glob(pattern)}
    named = ", ".join(str(root / path.relative_to(root)) for path in sorted(below)[:NAMED_BELOW])
    raise CheckpointError(
        f"folder holds no weights: {quoted(root.name)}",
        hint=f"folders below it do, name one: {printable(named)}"
        if below
        else "expected model.safetensors, an index, model_index.json or adapter_config.json in it; or name one file",
        where=str(root),
    )


def _open_component(source: str, root: Path, variant: str | None, component: str = "") -> Checkpoint | None:
    """One folder with one set of weights: an index, a single file of a known name, or the only weight file there."""
    config = _read_config(root)
    kind = "adapter" if (root / "adapter_config.json").is_file() else "folder"
    stems = sorted(STEMS, key=lambda stem: stem != "adapter_model") if kind == "adapter" else STEMS
    for stem in stems:
        for wanted in _variants(root, stem, variant):
            for name in _weight_names(stem, wanted):
                if not (root / name).is_file():
                    continue
                if name.endswith(".json"):
                    opened = _open_shards(source, root, root / name, component)
                    return Checkpoint(source, root, kind, opened.files, opened.tensors, config, opened.notes)
                file, tensors, notes = _open_file(root / name, name, component)
                return Checkpoint(source, root, kind, (file,), tensors, config, notes)
    weights = sorted(path for path in root.iterdir() if path.suffix in WEIGHT_SUFFIXES and path.is_file())
    if len(weights) > 1 or (weights and variant is not None):
        listed = ", ".join(printable(path.name) for path in weights[:4])
        raise CheckpointError(
            f"folder holds {len(weights)} weight file{'s' * (len(weights) > 1)}, and no "
            f"{'index' if variant is None else f'variant {variant}'}: {listed}",
            hint="name one of them",
            where=str(root),
        )
    if weights:
        parts = [f"{child}/" for child in WEIGHT_COMPONENTS if not component and (root / child).is_dir()]
        if parts:
            raise CheckpointError(
                f"folder holds {printable(weights[0].name)} and a pipeline in {', '.join(parts)}",
                hint="name the file, or add the pipeline's model_index.json",
                where=str(root),
            )
        file, tensors, notes = _open_file(weights[0], weights[0].name, component)
        return Checkpoint(source, root, kind, (file,), tensors, config, notes)
    return None


def _weight_names(stem: str, variant: str | None) -> list[str]:
    """Where a library looks for weights of this stem: safetensors before pickles, one file before shards."""
    suffix = f".{variant}" if variant else ""
    safe_index, pickle_index = index_names(stem, variant)
    pickles = [f"{stem}{suffix}.bin", *([f"pytorch_model{suffix}.bin"] if stem == "model" else [])]
    return [f"{stem}{suffix}.safetensors", safe_index, *pickles, pickle_index]


def _variants(root: Path, stem: str, variant: str | None) -> list[str | None]:
    """The asked variant; else the plain weights, then the only variant there is."""
    if variant is not None:
        return [variant]
    names = [path.name for path in root.iterdir() if path.suffix in (".safetensors", ".bin")]
    shape = re.compile(rf"{re.escape(stem)}\.([^.-]+)(-\d{{5}}-of-\d{{5}})?\.\w+")
    found = {match[1] for name in names if (match := shape.fullmatch(name))}
    return [None, found.pop()] if len(found) == 1 else [None]


def _open_shards(source: str, root: Path, index: Path, component: str = "") -> Checkpoint:
    weight_map, total_size = read_index(index)
    files, tensors, notes = [], dict[str, TensorInfo](), list[str]()
    shard_of: dict[str, str] = {}
    for shard in sorted(set(weight_map.values())):
        file, found, remarks = _open_file(root / shard, shard, component)
        for name in found:
            if name in tensors:
                raise CheckpointError(f"tensor {quoted(name)} is in two shards", where=str(index))
            shard_of[name.removeprefix(f"{component}.") if component else name] = shard
        files.append(file)
        tensors.update(found)
        notes.extend(remarks)
    each = sum(info.nbytes for info in tensors.values())
    once = sum({(info.path, info.offset, info.nbytes): info.nbytes for info in tensors.values()}.values())
    check_against_shards(index, weight_map, shard_of, total_size, (once, each))
    return Checkpoint(source, root, "folder", tuple(files), tensors, _read_config(root), tuple(notes))


def _open_pipeline(source: str, root: Path, variant: str | None) -> Checkpoint:
    parts: list[Checkpoint] = []
    notes: list[str] = []
    listed = _listed_components(root)
    folders = sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    for folder in folders:
        if listed is not None and folder.name not in listed:
            if any(path.suffix in WEIGHT_SUFFIXES for path in folder.iterdir()):
                notes.append(f"{printable(folder.name)}/ is not in model_index.json: its weights were left out")
            continue
        opened = _open_component(source, folder, variant, folder.name)
        if opened is not None:
            parts.append(opened)
    if not parts:
        raise CheckpointError("pipeline folder holds no component with weights", where=str(root))
    files = tuple(
        WeightFile(
            file.path, f"{file.component}/{file.relative}", file.component, file.format, file.metadata, file.tensors
        )
        for part in parts
        for file in part.files
    )
    tensors = {name: info for part in parts for name, info in part.tensors.items()}
    notes += [note for part in parts for note in part.notes]
    kind = "adapter" if all(part.kind == "adapter" for part in parts) else "pipeline"
    return Checkpoint(source, root, kind, files, tensors, _read_config(root), tuple(notes))


def _listed_components(root: Path) -> set[str] | None:
    """The components that `model_index.json` lists as ``name: [library, class]``; None where it lists none."""
    path = root / "model_index.json"
    content = read_json(path) if path.is_file() else {}
    return {name for name, entry in content.items() if isinstance(entry, list) and any(entry)} or None


def _read_config(root: Path) -> dict[str, Any]:
    for name in ("adapter_config.json", "config.json", "model_index.json"):
        path = root / name
        if path.is_file():
            return read_json(path)
    return {}


def read_json(path: Path) -> dict[str, Any]:
    """A bounded JSON object from a file beside the weights.

    Raises:
        CheckpointError: too large, not readable, no JSON object, or one that says the same key twice.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path.name} is over {MAX_JSON_BYTES:,} bytes", where=str(path))
        content = parse_strict(path.read_bytes(), any_number=True)
    except RepeatedKeyError as error:
        raise CheckpointError(f"key {quoted(error.key)} appears twice in {path.name}", where=str(path)) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {str(error)[:120]}", where=str(path)) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name} is not a JSON object", where=str(path))
    return content
