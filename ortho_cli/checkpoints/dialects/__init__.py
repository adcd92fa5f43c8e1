"""Which dialect an adapter file speaks, told by its tensors' names and its configuration, never by its file name.

dialect     told by                                                            read by
peft        adapter_config.json                                                peft.py (hra-llama too)
kohya       lora_unet_ lora_te_ oft_unet_ lycoris_ in front of a name          kohya.py (LyCORIS too)
ortho       X.hra_u, no base weights, ortho.method in the metadata             hra_repo.py
diffusers   lora_A/lora_B, .lora.down, .processor.to_q_lora, lora_adapter_...  diffusers_lora.py
hra-repo    X.hra_u in a checkpoint, or .processor.to_q_hra.hra_u              hra_repo.py
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ortho_cli import registry
from ortho_cli.checkpoints.header import printable
from ortho_cli.checkpoints.layouts import to_canonical
from ortho_cli.checkpoints.store import Checkpoint, open_checkpoint, read_json
from ortho_cli.errors import CheckpointError

from .contents import Contents, Dialect
from .hra_repo import RAW_VECTORS, read_hra
from .peft import PREFIX

__all__ = ["detect", "read"]


def detect(names: Collection[str], config: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    """The dialect of an adapter: `peft`, `kohya`, `ortho`, `diffusers` or `hra-repo`.

    Args:
        names: its tensor names.
        config: its ``adapter_config.json``, empty where there is none.
        metadata: its safetensors metadata.

    Raises:
        CheckpointError: no adapter, or a PEFT file without its configuration.

    >>> detect(["lora_unet_mid_block_attentions_0_proj_in.alpha"], {}, {})
    'kohya'
    """
    for name in registry.names("dialects"):
        if _dialect(name).claims(names, config, metadata):
            return name
    if any(name.startswith(PREFIX) for name in names):
        raise CheckpointError(
            "PEFT tensors without adapter_config.json, which says how they act",
            hint="name the folder that holds adapter_config.json and adapter_model.safetensors",
        )
    sample = printable(min(names)) if names else ""
    raise CheckpointError(
        f"no adapter: {len(names)} tensors, none named as in any dialect (the first is {sample!r})",
        hint="read are PEFT folders, kohya, LyCORIS and diffusers LoRA files, and checkpoints that hold HRA",
    )


def read(checkpoint: Checkpoint) -> tuple[str, Contents, dict[str, Any], dict[str, str]]:
    """The dialect of an opened adapter, its contents, configuration and metadata."""
    where, metadata = str(checkpoint.root), checkpoint.metadata
    components = sorted({file.component for file in checkpoint.files})
    if checkpoint.kind == "adapter" and components != [""]:
        contents, configs, dialects = Contents(), dict[str, Any](), set[str]()
        for component in components:
            dialect, found, configs[component], _ = read(_component(checkpoint, component))
            contents.take(found, component)
            dialects.add(dialect)
        contents.rename(lambda name: to_canonical(name, "sd15-diffusers"))  # `text_model.`, which CLIP has lost
        return "+".join(sorted(dialects)), contents, configs, metadata
    config = dict(checkpoint.config) if checkpoint.kind == "adapter" else _config_beside(checkpoint)
    try:
        name = detect(checkpoint.tensors, config, metadata)
    except CheckpointError as error:
        raise CheckpointError(error.message, hint=error.hint, where=where) from error
    dialect, contents, config = _dialect(name).read(checkpoint.tensors, config, metadata, where)
    raw = _folder(checkpoint) / RAW_VECTORS
    if name == "peft" and raw.is_file():
        return "ortho", _with_vectors(contents, raw), config, {**metadata, **open_checkpoint(raw).metadata}
    return dialect, contents, config, metadata


def _component(checkpoint: Checkpoint, component: str) -> Checkpoint:
    """One component of an opened adapter as a checkpoint of its own, under its own names."""
    prefix, root = f"{component}.", checkpoint.root / component
    files = tuple(
        replace(
            file,
            relative=file.relative.removeprefix(f"{component}/"),
            component="",
            tensors=tuple(name.removeprefix(prefix) for name in file.tensors),
        )
        for file in checkpoint.files
        if file.component == component
    )
    tensors = {name: replace(checkpoint.tensors[prefix + name], name=name) for file in files for name in file.tensors}
    return Checkpoint(checkpoint.source, root, "adapter", files, tensors, read_json(root / "adapter_config.json"))


def _dialect(name: str) -> Dialect:
    found: Dialect = registry.resolve("dialects", name)
    return found


def _folder(checkpoint: Checkpoint) -> Path:
    return checkpoint.root if checkpoint.root.is_dir() else checkpoint.root.parent


def _config_beside(checkpoint: Checkpoint) -> dict[str, Any]:
    """The configuration next to a PEFT weight file that was named itself."""
    path = _folder(checkpoint) / "adapter_config.json"
    named = any(name.startswith(PREFIX) for name in checkpoint.tensors)
    return read_json(path) if named and checkpoint.kind == "file" and path.is_file() else {}


def _with_vectors(contents: Contents, raw: Path) -> Contents:
    """The same adapter, its LoRA form replaced by the reflections it was exported from."""
    opened = open_checkpoint(raw)
    vectors = read_hra(opened.tensors, opened.metadata, str(raw))
    if vectors.layers.keys() != contents.layers.keys():
        other = min(vectors.layers.keys() ^ contents.layers.keys())
        raise CheckpointError(
            f"{RAW_VECTORS} and the adapter beside it differ: layer {other!r} is in one only", where=str(raw)
        )
    contents.layers = vectors.layers
    contents.bound = False
    contents.notes += [*vectors.notes, f"read from the reflections in {RAW_VECTORS}, not from the LoRA beside it"]
    return contents
