"""What an adapter in a model is on disk: tensors, PEFT's configuration, and HRA's raw vectors where PEFT has no form.

Input-side reflections are PEFT's HRA. Output-side, soft, or on a transposed weight they are the exact LoRA, right for
this base only, with the vectors beside it in `hra.safetensors`, from which `ortho` goes on (CONTRACTS 3).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ortho_cli.checkpoints import targets
from ortho_cli.checkpoints.dialects.peft import PREFIX
from ortho_cli.checkpoints.dialects.writing import peft_config
from ortho_cli.errors import TargetError
from ortho_cli.linalg.starts import pad_pairs

from .adapter_layer import AdapterLayer, base_of, stored_weight, whole
from .hra_layer import HRALayer
from .inject import named_layers
from .lora_layer import LoRALayer
from .saved_modules import saved_modules

__all__ = ["AdapterFiles", "adapter_files", "check_savable"]

FLIPPED = {"input": "output", "output": "input"}


@dataclass
class AdapterFiles:
    """Tensors by name, `adapter_config.json`, and what else the folder says."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    method: dict[str, Any]
    raw: dict[str, Tensor] = field(default_factory=dict)
    raw_method: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def check_savable(layers: Mapping[str, AdapterLayer]) -> None:
    """Refuse, best before training, a set of adapted layers that no folder can hold.

    Raises:
        TargetError: nothing adapted, adapters of several kinds, two on one layer, or transposed and other weights.
    """
    if not layers:
        raise TargetError("the model has no adapter", hint="put one in: ortho.add_adapter(model, rank, targets)")
    doubled = [name for name, layer in layers.items() if isinstance(layer.fixed_linear, AdapterLayer)]
    if doubled:
        raise TargetError(
            f"layer {doubled[0]} holds two adapters, and a folder holds one", hint="fold the first into its base"
        )
    kinds = {(type(layer), _form(layer)): name for name, layer in layers.items()}
    if len(kinds) > 1:
        first, second, *_ = kinds.values()
        raise TargetError(f"layers {first} and {second} hold adapters of different kinds, and a folder holds one kind")
    if len({layer.geometry.kind == "transposed" for layer in layers.values()}) > 1:
        raise TargetError(
            "adapters on transformers' Conv1D and on other layers do not go into one folder",
            hint="choose the one or the other, e.g. exclude lm_head",
        )


def _form(layer: AdapterLayer) -> object:
    return (layer.side, layer.form, layer.start is not None) if isinstance(layer, HRALayer) else None


def adapter_files(model: nn.Module, layers: Mapping[str, AdapterLayer]) -> AdapterFiles:
    """Everything that trains in a model, as a folder's contents.

    Args:
        model: the whole model: what trains beside the adapter is saved with it.
        layers: the adapted layers, of one kind.

    Raises:
        TargetError: see `check_savable`; or a LoRA form of a layer whose weight cannot be read.
    """
    check_savable(layers)
    hra = {name: layer for name, layer in layers.items() if isinstance(layer, HRALayer)}
    modules = targets.suffixes(list(layers), list(named_layers(model))) or sorted(layers)
    if hra:
        chains = {name: layer.chain() for name, layer in hra.items()}
        files = _peft_hra(hra, chains, modules) or _bound_lora(hra, chains, modules)
    else:
        files = _lora({name: layer for name, layer in layers.items() if isinstance(layer, LoRALayer)}, modules)
    beside = saved_modules(model, layers)
    files.tensors |= {PREFIX + name: tensor for name, tensor in beside.tensors.items()}
    if beside.bias != "none":
        adapted = f"{files.config['peft_type'].lower()}_only"
        files.config["bias"] = "all" if beside.bias == "all" else adapted
    files.config["modules_to_save"] = beside.modules or None
    return files


def _hra_method(layer: HRALayer) -> dict[str, Any]:
    """As `add-hra` records it: `gram_schmidt` is how it trains, `apply_GS` how the stored columns act."""
    spans = layer.form.span
    return {
        "name": "hra", "rank": layer.rank, "side": layer.side, "eps": layer.form.eps, "gram_schmidt": spans,
        "apply_GS": spans and layer.start is None,
        "start": "reflection" if spans and layer.start is None else "identity",
    }  # fmt: skip


def _peft_hra(hra: dict[str, HRALayer], chains: dict[str, Tensor], modules: list[str]) -> AdapterFiles | None:
    """PEFT's own HRA, where it can say what these layers do."""
    first = next(iter(hra.values()))
    method = _hra_method(first)
    ranks = {name: chain.shape[1] for name, chain in chains.items()}
    rank = max(ranks.values())
    plain = first.side == "input" and not first.form.eps and first.geometry.kind != "transposed"
    padded = all(not (rank - own) % 2 and chains[name].shape[0] >= rank for name, own in ranks.items())
    if not plain or not padded or (method["apply_GS"] and len(set(ranks.values())) > 1):
        return None
    tensors = {f"{PREFIX}{name}.hra_u": pad_pairs(chain, rank) for name, chain in chains.items()}
    config = peft_config("HRA", rank, modules, apply_gs=method["apply_GS"])
    alone = [name for name, layer in hra.items() if not _peft_runs(base_of(layer))]
    notes = [f"{len(alone)} layers (first {alone[0]}) are none that PEFT's HRA runs on; ortho does"] if alone else []
    return AdapterFiles(tensors, config, method, notes=notes)


def _peft_runs(base: nn.Module) -> bool:
    """Whether PEFT's HRA computes this layer rightly: it ignores groups, dilation and padding modes."""
    if not isinstance(base, nn.Conv2d):
        return isinstance(base, nn.Linear)
    square = all(len(set(pair)) == 1 for pair in (base.kernel_size, base.stride) if isinstance(pair, tuple))
    simple = isinstance(base.padding, tuple) and len(set(base.padding)) == 1 and base.padding_mode == "zeros"
    return square and simple and base.groups == 1 and set(base.dilation) == {1}


def _bound_lora(hra: dict[str, HRALayer], chains: dict[str, Tensor], modules: list[str]) -> AdapterFiles:
    """The exact LoRA of each chain on its weight, and the vectors themselves."""
    tensors: dict[str, Tensor] = {}
    transposed = False
    for name, layer in hra.items():
        weight = stored_weight(layer).detach()
        transposed = layer.geometry.kind == "transposed"
        matrix = (weight.T if transposed else weight.flatten(1)).to(torch.promote_types(weight.dtype, torch.float32))
        up, down = layer.operator().to(matrix.dtype).as_low_rank(matrix)
        tensors |= _factors(name, up, down, base_of(layer))
    config = _lora_config({name: chain.shape[1] for name, chain in chains.items()}, {}, modules, transposed)
    first = next(iter(hra.values()))
    method = _hra_method(first) | {"form": "lora", "base_bound": True}
    raw_method = _hra_method(first)
    if transposed:  # a file knows the weight as it is stored: what turns inputs turns its rows
        raw_method["side"] = FLIPPED[first.side]
    return AdapterFiles(
        tensors, config, method, {f"{name}.hra_u": chain for name, chain in chains.items()}, raw_method,
        ["written as the exact LoRA for this base; the reflections are in hra.safetensors"],
    )  # fmt: skip


def _lora(lora: dict[str, LoRALayer], modules: list[str]) -> AdapterFiles:
    tensors: dict[str, Tensor] = {}
    for name, layer in lora.items():
        tensors |= _factors(name, whole(layer.lora_B).detach(), whole(layer.lora_A).detach(), base_of(layer))
    transposed = any(layer.geometry.kind == "transposed" for layer in lora.values())
    ranks = {name: layer.rank for name, layer in lora.items()}
    alphas = {name: layer.scale * layer.rank for name, layer in lora.items()}
    config = _lora_config(ranks, alphas, modules, transposed)
    dilated = [name for name, layer in lora.items() if set(getattr(base_of(layer), "dilation", (1,))) != {1}]
    notes = [f"PEFT itself ignores the dilation of {len(dilated)} layers, first {dilated[0]}"] if dilated else []
    return AdapterFiles(tensors, config, {"name": "lora", "rank": max(ranks.values())}, notes=notes)


def _factors(name: str, up: Tensor, down: Tensor, base: nn.Module) -> dict[str, Tensor]:
    """A layer's factors under PEFT's names; a convolution's as kernels."""
    if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        kernel = base.weight.shape
        down, up = down.reshape(-1, *kernel[1:]), up.reshape(kernel[0], -1, *[1] * (len(kernel) - 2))
    return {f"{PREFIX}{name}.lora_A.weight": down, f"{PREFIX}{name}.lora_B.weight": up}


def _lora_config(
    ranks: Mapping[str, int], alphas: Mapping[str, float], modules: list[str], transposed: bool
) -> dict[str, Any]:
    """One rank and alpha for most layers, patterns for the others."""
    alphas = {name: alphas.get(name, float(rank)) for name, rank in ranks.items()}
    (rank, alpha), _ = Counter((ranks[name], alphas[name]) for name in ranks).most_common(1)[0]
    config = peft_config(
        "LORA", rank, modules, alpha=_number(alpha),
        rank_pattern={name: own for name, own in ranks.items() if own != rank},
        alpha_pattern={name: _number(own) for name, own in alphas.items() if own != alpha},
    )  # fmt: skip
    return config | {"fan_in_fan_out": transposed}


def _number(value: float) -> float:
    """A whole number as an integer, as PEFT writes it."""
    return int(value) if value == int(value) else value
