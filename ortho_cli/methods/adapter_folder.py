"""Write the adapter in a model as a PEFT folder: `ortho.save_adapter`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from ortho_cli import __version__
from ortho_cli.checkpoints import layouts
from ortho_cli.checkpoints.dialects.hra_repo import RAW_VECTORS
from ortho_cli.checkpoints.fingerprint import EDGE_VALUES
from ortho_cli.checkpoints.output import atomic, check_output
from ortho_cli.checkpoints.reading import tensor_bytes
from ortho_cli.checkpoints.tensors import TORCH_DTYPES
from ortho_cli.checkpoints.writer import Piece, computed, file_bytes, write_file

from .adapter_files import adapter_files
from .adapter_layer import AdapterLayer, adapter_layers, stored_weight
from .inject import Named, inner_model, named_layers

__all__ = ["model_fingerprint", "save_adapter", "tensor_piece", "write_adapter"]

DTYPES = {name: dtype for dtype, name in TORCH_DTYPES.items()}


def save_adapter(model: nn.Module, folder: str | Path, *, force: bool = False) -> Path:
    """Write the adapter of a model as a PEFT folder, which `PeftModel.from_pretrained` and `load_adapter` read.

    Saved is what trains: the adapter, and biases and whole modules (a new head) that were unfrozen beside it.
    Input-side HRA is PEFT's HRA; output-side and soft HRA is written as its exact LoRA, which is right on this base
    only, with the vectors beside it in `hra.safetensors`.

    Args:
        model: with an adapter of `add_adapter` or `load_adapter` in it.
        folder: to write; appears whole or not at all.
        force: replace an existing adapter folder.

    Returns:
        The folder.

    Raises:
        TargetError: no adapter, or several that no folder can hold.
        OutputError: the folder exists, or cannot be written.

    >>> import tempfile
    >>> import ortho_cli as ortho
    >>> model = ortho.add_adapter(nn.Sequential(nn.Linear(8, 8)), rank=2, targets=["0"])
    >>> _ = nn.init.normal_(model[0].vectors)
    >>> folder = ortho.save_adapter(model, tempfile.mkdtemp() + "/adapter")
    >>> sorted(path.name for path in folder.iterdir())
    ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
    """
    model = inner_model(model)
    write_adapter(model, adapter_layers(model), Path(folder), command="ortho.save_adapter", force=force)
    return Path(folder)


def write_adapter(
    model: nn.Module,
    layers: Mapping[str, AdapterLayer],
    folder: Path,
    *,
    command: str,
    base_name: str | None = None,
    extra: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    force: bool = False,
) -> list[str]:
    """Write some adapted layers of a model, and what trains beside them.

    Args:
        model: the model.
        layers: its adapted layers by name.
        folder: to write.
        command: what made the adapter, for the metadata.
        base_name: the base's hub id, for PEFT.
        extra: further fields of `ortho.method`.
        notes: what the model card should say beside its own.
        force: replace an existing adapter folder.

    Returns:
        Notes on what the folder is.
    """
    files = adapter_files(model, layers)
    files.config["base_model_name_or_path"] = base_name
    metadata = {"format": "pt", "ortho.version": __version__, "ortho.command": command}
    metadata["ortho.targets"] = json.dumps(files.config["target_modules"])
    fingerprint = model_fingerprint(named_layers(model), layers)
    if fingerprint is not None:
        metadata["ortho.base_fingerprint"] = fingerprint
    written = {"adapter_model.safetensors": (files.tensors, files.method | dict(extra or {}))}
    if files.raw:
        written[RAW_VECTORS] = (files.raw, files.raw_method | dict(extra or {}))
    outputs: dict[str, tuple[list[Piece], dict[str, str]]] = {
        name: (
            [tensor_piece(key, tensor) for key, tensor in tensors.items()],
            metadata | {"ortho.method": json.dumps(method, sort_keys=True)},
        )
        for name, (tensors, method) in written.items()
    }
    needed = sum(file_bytes(pieces, described) for pieces, described in outputs.values())
    check_output(folder, [], needed, force=force)
    with atomic(folder) as partial:
        partial.mkdir()
        for name, (pieces, described) in outputs.items():
            write_file(partial / name, pieces, described)
        (partial / "adapter_config.json").write_text(json.dumps(files.config, indent=2, sort_keys=True) + "\n", "utf-8")
        (partial / "README.md").write_text(_card(files.config, command, base_name, [*notes, *files.notes]), "utf-8")
    return files.notes


def tensor_piece(name: str, tensor: Tensor) -> Piece:
    """A tensor of any device as a tensor of an output file."""

    def produce() -> Iterator[Any]:
        yield tensor_bytes(tensor.cpu())

    return computed(name, DTYPES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape), produce)


def model_fingerprint(named: Named, layers: Mapping[str, AdapterLayer]) -> str | None:
    """The base fingerprint (CONTRACTS 2) of layers in memory: what `base_fingerprint` finds in the base's file.

    Args:
        named: the model's layers, for their naming.
        layers: the adapted ones.

    Returns:
        64 hexadecimal digits; None where a weight cannot be read.
    """
    if any(layer.geometry.kind == "opaque" for layer in layers.values()):
        return None
    canonical = {name: named.canonical(name) for name in layers}
    digest = hashlib.sha256()
    for name, full in sorted(canonical.items(), key=lambda item: (layouts.fingerprint_name(item[1]), item[1])):
        weight = stored_weight(layers[name]).detach()
        digest.update(f"{layouts.fingerprint_name(full)}:{weight.shape[0]}x{prod(weight.shape[1:])}\n".encode())
        flat = weight.reshape(-1)
        for part in (flat[:EDGE_VALUES], flat[-EDGE_VALUES:]):
            with np.errstate(over="ignore"):
                digest.update(part.double().cpu().numpy().astype("<f2").tobytes())
    return digest.hexdigest()


def _card(config: Mapping[str, Any], command: str, base_name: str | None, notes: list[str]) -> str:
    """The model card, with the hub's front matter."""
    kind = config["peft_type"]
    front = ["library_name: peft", *([f"base_model: {base_name}"] if base_name else [])]
    front += ["tags:", "- ortho", f"- {kind.lower()}"]
    shown = ", ".join(f"`{module}`" for module in config["target_modules"][:8])
    shown += ", ..." if len(config["target_modules"]) > 8 else ""
    lines = ["---", *front, "---", "", f"# {kind} adapter, rank {config['r']}", "", f"Made by `{command}`.", ""]
    lines += [f"- adapted layers: {shown}", *(f"- {note}" for note in notes), ""]
    lines += ["```python", "import ortho_cli as ortho", 'model = ortho.load_adapter(model, "THIS_FOLDER")', "```", ""]
    lines += ["```python", "from peft import PeftModel", 'model = PeftModel.from_pretrained(model, "THIS_FOLDER")']
    lines += ["```", ""]
    return "\n".join(lines)
