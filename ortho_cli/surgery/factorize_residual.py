"""The PiSSA-like pair: a LoRA that holds the leading components of every layer, and the base that is left without them.

Together they are the checkpoint; trained, the adapter moves what matters most first. It is right with this residual
only, and says so by its fingerprint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ortho_cli.checkpoints.dialects.writing import lora_tensor_names
from ortho_cli.checkpoints.fingerprint import edge_values, fingerprint_of
from ortho_cli.checkpoints.layer_pool import LayerPool
from ortho_cli.checkpoints.store import Checkpoint
from ortho_cli.checkpoints.tensors import TensorInfo
from ortho_cli.checkpoints.writer import Piece, computed, copied
from ortho_cli.errors import TargetError

from .adapter_folder import Factor, by_component, lora_folder
from .factorize_layers import Computed, FromPool, OnDone
from .factorize_selection import FactorLayer
from .mirror import Mirror, mirror
from .plan import OutputFile

__all__ = ["ADAPTER", "BASE", "Chosen", "adapter_order", "residual_files"]

BASE, ADAPTER = "base", "adapter"
UNKNOWN = "0" * 64  # stands in for the residual's fingerprint until its last layer is computed


class Chosen(NamedTuple):
    """A layer with its rank."""

    layer: FactorLayer
    rank: int


def residual_files(
    checkpoint: Checkpoint,
    output: Path,
    chosen: Mapping[str, Chosen],
    metadata: dict[str, str],
    residuals: LayerPool[Computed],
    factors: LayerPool[Computed],
    done: OnDone,
) -> Mirror:
    """Lay out `base/`, like the checkpoint, and `adapter/`, a PEFT folder.

    Args:
        checkpoint: the checkpoint.
        output: the folder of both.
        chosen: the layers, by name.
        metadata: of both.
        residuals: computes "weight", taken once.
        factors: computes "U" and "VT".
        done: told of each layer's figures.

    Raises:
        TargetError: transformers' Conv1D beside other layers, which one PEFT folder cannot hold.
    """
    _check_kinds(chosen)
    adapter = _adapter(checkpoint, chosen, metadata, factors)
    edges: dict[str, bytes] = {}

    def residual_done(name: str, result: Computed) -> None:
        done(name, result)
        edges[name] = edge_values(result.tensors["weight"])
        if len(edges) == len(chosen):
            entries = ((chosen[name].layer.canonical, chosen[name].layer.info.shape, edges[name]) for name in chosen)
            fingerprint = fingerprint_of(entries)
            for file in adapter.files:  # not yet written: its base comes first
                file.metadata["ortho.base_fingerprint"] = fingerprint

    by_weight = {entry.layer.info.name: name for name, entry in chosen.items()}

    def transform(tensor: str, info: TensorInfo) -> Sequence[Piece]:
        name = by_weight.get(tensor)
        if name is None:
            return [copied(info, tensor)]
        return [computed(tensor, info.dtype, info.shape, FromPool(residuals, name, "weight", residual_done))]

    base = mirror(checkpoint, output, transform, metadata)
    files = [OutputFile(f"{BASE}/{file.relative}", file.pieces, file.metadata) for file in base.files]
    texts = {f"{BASE}/{name}": text for name, text in base.texts.items()}
    copies = [(path, f"{BASE}/{relative}") for path, relative in base.copies]
    return Mirror([*files, *adapter.files], copies, {**texts, **adapter.texts}, [*base.notes, *adapter.notes])


def adapter_order(chosen: Mapping[str, Chosen]) -> list[str]:
    """The layers in the order in which the adapter's factors are written."""
    native = {entry.layer.canonical: name for name, entry in chosen.items()}
    groups = by_component(native).values()
    order = [sorted(group, key=lambda layer: lora_tensor_names("peft-lora", layer)["down"]) for group in groups]
    return [native[canonical] for group in order for canonical in group]


def _check_kinds(chosen: Mapping[str, Chosen]) -> None:
    kinds = {entry.layer.view.kind == "conv1d": name for name, entry in chosen.items()}
    if len(kinds) > 1:
        raise TargetError(
            f"layers {kinds[True]} (a transformers Conv1D) and {kinds[False]} do not go into one PEFT folder",
            hint="choose the one or the other kind with --targets",
        )


def _adapter(
    checkpoint: Checkpoint, chosen: Mapping[str, Chosen], metadata: dict[str, str], pool: LayerPool[Computed]
) -> Mirror:
    """The LoRA: `B = U` and `A = VT`, shaped for Linear or convolution."""
    layers: dict[str, tuple[Factor, Factor]] = {}
    for name, (layer, rank) in chosen.items():
        up, down = layer.lora_shapes(rank)
        layers[layer.canonical] = (
            Factor(up, partial(_shaped, FromPool(pool, name, "U"), up)),
            Factor(down, partial(_shaped, FromPool(pool, name, "VT"), down)),
        )
    method = {"name": "lora", "form": "residual", "base_bound": True}
    transposed = any(entry.layer.view.kind == "conv1d" for entry in chosen.values())
    written = lora_folder(
        layers, checkpoint, {**metadata, "ortho.method": json.dumps(method, sort_keys=True)}, transposed=transposed
    )
    for file in written.files:
        file.metadata["ortho.base_fingerprint"] = UNKNOWN
    files = [OutputFile(f"{ADAPTER}/{file.relative}", file.pieces, file.metadata) for file in written.files]
    return Mirror(files, [], {f"{ADAPTER}/{name}": text for name, text in written.texts.items()}, written.notes)


def _shaped(source: FromPool, shape: tuple[int, ...]) -> Any:
    return source.tensor().reshape(shape)
