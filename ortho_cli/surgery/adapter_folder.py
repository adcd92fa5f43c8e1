"""Lay out a PEFT adapter folder: configuration, tensors, and a model card the hub can read.

Adapters on several components of a pipeline become one folder each (`unet/`, `text_encoder/`), as PEFT wants them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ortho_cli.checkpoints import layouts, targets
from ortho_cli.checkpoints.dialects.writing import hra_tensor_name, lora_tensor_names, peft_config, peft_name
from ortho_cli.checkpoints.reading import tensor_bytes
from ortho_cli.checkpoints.store import Checkpoint
from ortho_cli.checkpoints.writer import Piece, computed
from ortho_cli.errors import TargetError

from .plan import OutputFile

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AdapterFiles", "Factor", "by_component", "hra_folder", "lora_configs", "lora_folder"]


@dataclass(frozen=True)
class Factor:
    """One tensor of an adapter: its shape, and how to make it when the plan runs."""

    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    def piece(self, name: str) -> Piece:
        """The factor as a float32 tensor of an output file."""

        def produce() -> Iterator[Any]:
            yield tensor_bytes(self.make().float())

        return computed(name, "F32", self.shape, produce)


@dataclass
class AdapterFiles:
    """What an adapter folder will hold."""

    files: list[OutputFile] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def hra_folder(
    layers: Mapping[str, Factor], base: Checkpoint | None, metadata: dict[str, str], *, gram_schmidt: bool = False
) -> AdapterFiles:
    """A PEFT HRA adapter: `layers` maps canonical layer names to their ``(in, r)`` vectors.

    PEFT has one rank for all layers: fewer reflections are padded with equal column pairs, which cancel.

    Raises:
        TargetError: ranks of both parities, which no padding makes equal.
    """
    ranks = {layer: factor.shape[1] for layer, factor in layers.items()}
    rank = max(ranks.values())
    odd = [layer for layer, own in ranks.items() if (rank - own) % 2]
    if odd:
        raise TargetError(
            f"ranks {ranks[odd[0]]} (at {odd[0]}) and {rank} differ by an odd number; PEFT has one rank for all layers",
            hint="export as LoRA instead: --to peft-lora --base BASE",
        )
    narrow = [layer for layer, factor in layers.items() if factor.shape[0] < rank]
    if narrow:
        raise TargetError(
            f"layer {narrow[0]} is {layers[narrow[0]].shape[0]} wide; PEFT has one rank for all layers, here {rank}",
            hint="leave narrow layers out (--exclude), or keep the adapter in the checkpoint (--as checkpoint)",
        )
    result = AdapterFiles(notes=_name_notes(layers))
    padded = sum(own < rank for own in ranks.values())
    if padded:
        result.notes.append(f"{padded} layers of lower rank are padded to {rank} with column pairs that cancel")
    for folder, group in by_component(layers).items():
        pieces = [_padded(layers[layer], rank).piece(hra_tensor_name("peft-hra", layer)) for layer in group]
        modules = _target_modules(group, base)
        config = peft_config("HRA", rank, modules, apply_gs=gram_schmidt, base_name=_hub_name(base))
        _add(result, folder, pieces, config, metadata, f"Householder reflection adapter (HRA), rank {rank}", base)
    return result


def lora_folder(
    layers: Mapping[str, tuple[Factor, Factor]],
    base: Checkpoint | None,
    metadata: dict[str, str],
    *,
    transposed: bool = False,
) -> AdapterFiles:
    """A PEFT LoRA adapter of scale 1: `layers` maps canonical names to up ``(out, r)`` and down ``(r, in)``.

    `transposed`: the layers are transformers' Conv1D, which keep their weight as ``(in, out)``.
    """
    result = AdapterFiles(notes=_name_notes(layers))
    configs = lora_configs({layer: down.shape[0] for layer, (_, down) in layers.items()}, base)
    for folder, group in by_component(layers).items():
        pieces = []
        for layer in group:
            names = lora_tensor_names("peft-lora", layer)
            pieces += [layers[layer][0].piece(names["up"]), layers[layer][1].piece(names["down"])]
        config = configs[layouts.component_name(group[0])[0]] | {"fan_in_fan_out": transposed}
        _add(result, folder, pieces, config, metadata, f"LoRA adapter, rank {config['r']}", base)
    return result


def lora_configs(ranks: Mapping[str, int], base: Checkpoint | None) -> dict[str, dict[str, Any]]:
    """PEFT's configuration for each component of some LoRA layers (canonical name -> rank); alpha is the rank."""
    groups: dict[str, list[str]] = {}
    for layer in ranks:
        groups.setdefault(layouts.component_name(layer)[0], []).append(layer)
    configs = {}
    for component, group in groups.items():
        own = [ranks[layer] for layer in group]
        common = max(set(own), key=lambda rank: (own.count(rank), rank))
        other = {peft_name(layer): ranks[layer] for layer in group if ranks[layer] != common}
        configs[component] = peft_config(
            "LORA", common, _target_modules(group, base), alpha=common, rank_pattern=other, alpha_pattern=other,
            base_name=_hub_name(base),
        )  # fmt: skip
    return configs


def by_component(layers: Mapping[str, object]) -> dict[str, list[str]]:
    """Canonical layers by the folder they go to: "" where all lie in one component."""
    groups: dict[str, list[str]] = {}
    for layer in layers:
        groups.setdefault(layouts.component_name(layer)[0], []).append(layer)
    return groups if len(groups) > 1 else {"": [layer for group in groups.values() for layer in group]}


def _name_notes(layers: Mapping[str, object]) -> list[str]:
    """PEFT needs the very names of the model in memory, and CLIP's text encoder changed its own."""
    if not any(layer.startswith("text_encoder.text_model.") for layer in layers):
        return []
    return ["the text encoder's layers are named as in transformers 5.6 and newer, without text_model."]


def _add(
    result: AdapterFiles,
    folder: str,
    pieces: list[Piece],
    config: dict[str, Any],
    metadata: dict[str, str],
    title: str,
    base: Checkpoint | None,
) -> None:
    prefix = f"{folder}/" if folder else ""
    result.files.append(OutputFile(f"{prefix}adapter_model.safetensors", pieces, {"format": "pt", **metadata}))
    result.texts[f"{prefix}adapter_config.json"] = json.dumps(config, indent=2, sort_keys=True) + "\n"
    result.texts[f"{prefix}README.md"] = _card(title, config, metadata, base)


def _padded(factor: Factor, rank: int) -> Factor:
    width, own = factor.shape
    if own == rank:
        return factor

    def make() -> Tensor:
        from ortho_cli.linalg.starts import pad_pairs

        return pad_pairs(factor.make(), rank)

    return Factor((width, rank), make)


def _target_modules(group: list[str], base: Checkpoint | None) -> list[str]:
    """The shortest list of suffixes that means exactly these layers to PEFT, else their full names."""
    local = [peft_name(layer) for layer in group]
    if base is None:
        return sorted(local)
    component = layouts.component_name(group[0])[0]
    canonical = [layouts.to_canonical(name, base.layout) for name in base.layers()]
    others = [peft_name(name) for name in canonical if layouts.component_name(name)[0] == component]
    return targets.suffixes(local, others) or sorted(local)


def _hub_name(base: Checkpoint | None) -> str | None:
    """The base's hub id; a local path is nobody else's business."""
    if base is None or Path(base.source).expanduser().exists():
        return None
    return base.source.partition("@")[0].partition(":")[0]


def _card(title: str, config: dict[str, Any], metadata: dict[str, str], base: Checkpoint | None) -> str:
    name = _hub_name(base)
    front = ["library_name: peft", *([f"base_model: {name}"] if name else [])]
    front += ["tags:", "- ortho", f"- {config['peft_type'].lower()}"]
    lines = ["---", *front, "---", "", f"# {title}", "", f"Made by `{metadata.get('ortho.command', 'ortho')}`.", ""]
    modules = config["target_modules"]
    shown = ", ".join(f"`{module}`" for module in modules[:8]) + (", ..." if len(modules) > 8 else "")
    lines += [f"- adapted layers: {shown}"]
    if "ortho.base_fingerprint" in metadata:
        lines.append(f"- base fingerprint: `{metadata['ortho.base_fingerprint'][:16]}`")
    lines += [
        "",
        "```python",
        "from peft import PeftModel",
        'model = PeftModel.from_pretrained(model, "THIS_FOLDER")',
        "```",
        "",
    ]
    return "\n".join(lines)
