"""What a PEFT folder holds beside the factors: whole modules, biases, trained token rows, resized embeddings.

All of them take the place of base tensors, whose names come from wrapping and unwrapping the saved ones: PEFT saves
`modules_to_save` under plain module names, biases of adapted layers under `X.base_layer.bias`, token rows under
`X.token_adapter.trainable_tokens_delta`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ortho_cli.checkpoints.tensors import TensorInfo
from ortho_cli.errors import CheckpointError

from .contents import Contents

__all__ = ["MUTATING", "read_extras"]

# Initialisations that subtract the start of A B from the base weight (`LoraLayer.*_init`), by the start of their name.
MUTATING = ("pissa", "olora", "corda", "lora_ga", "loftq")
# Modules whose weight PEFT saves when the vocabulary was resized or the embedding is targeted, by their last name.
EMBEDDINGS = (
    "embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "token_embedding", "embed_in", "embed_out",
    "tok_embeddings", "embeddings", "output_embeddings", "proj_out", "decoder",
)  # fmt: skip


def read_extras(
    rest: Mapping[str, TensorInfo], config: Mapping[str, Any], contents: Contents, where: str
) -> dict[str, TensorInfo]:
    """Put every tensor that replaces one of the base's into `contents`; give back those that are not understood.

    Args:
        rest: tensors without a role, by their names below ``base_model.model.``.
        config: the adapter's configuration.
        contents: receives `replacements`, `row_replacements` and notes.
        where: the file, for errors.
    """
    left = {}
    originals = 0
    for key, info in rest.items():
        if key.endswith(".token_adapter.trainable_tokens_delta"):
            layer = key.removesuffix(".token_adapter.trainable_tokens_delta")
            contents.row_replacements[f"{layer}.weight"] = (_indices(config, layer, info, where), info)
        elif ".original_module." in key:
            originals += 1  # the frozen copy of a saved module: the base has it
        else:
            name = _replaced(key, config, where)
            if name is None:
                left[key] = info
            else:
                contents.replacements[name] = info
    if originals:
        contents.notes.append(f"{originals} tensors of the base's own modules (original_module) are not used")
    return left


def _replaced(key: str, config: Mapping[str, Any], where: str) -> str | None:
    """The base tensor that a saved tensor replaces, None where nothing says that it replaces one."""
    wrapped = re.sub(r"\.(?:token_adapter\.)?base_layer\.(?=(?:weight|bias)$)", ".", key)
    if wrapped != key:
        return wrapped
    saved = re.sub(r"\.modules_to_save\.(?:default\.)?", ".", key)
    if saved != key:
        return saved
    module, _, last = key.rpartition(".")
    modules = config.get("modules_to_save") or []
    if not isinstance(modules, list):  # a text would match by its letters
        raise CheckpointError(f"modules_to_save is {str(modules)[:80]!r}, a list was expected", where=where)
    parts = module.split(".")
    if any(".".join(parts[:end]).endswith(str(name)) for end in range(1, len(parts) + 1) for name in modules):
        return key
    if last == "bias" and config.get("bias", "none") != "none":
        return key
    if last == "weight" and parts[-1] in EMBEDDINGS:
        return key
    return None


def _indices(config: Mapping[str, Any], layer: str, info: TensorInfo, where: str) -> tuple[int, ...]:
    """Which rows were trained, from `trainable_token_indices` (a list, or a map from embedding to list)."""
    found = config.get("trainable_token_indices")
    if isinstance(found, Mapping):
        found = next((rows for name, rows in found.items() if layer == name or layer.endswith(f".{name}")), None)
    if not isinstance(found, list) or not all(isinstance(row, int) and row >= 0 for row in found):
        raise CheckpointError(f"trainable_token_indices has no list of rows for {layer!r}", where=where)
    if len(info.shape) != 2 or info.shape[0] != len(found):
        raise CheckpointError(f"{info.name!r} has shape {info.shape}, {len(found)} rows were expected", where=where)
    return tuple(found)
