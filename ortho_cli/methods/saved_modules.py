"""What trains beside an adapter and is saved with it: biases, and whole modules such as a new head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from .adapter_layer import AdapterLayer, whole

__all__ = ["SavedModules", "mark_replaced", "replaced_modules", "saved_modules"]

REPLACED = "replaced_by_adapter"  # an attribute of the modules whose tensors an adapter's file brought


@dataclass
class SavedModules:
    """Tensors by PEFT's names below its prefix; which biases they hold (`none`, `only` adapted layers', `all`)."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    bias: str = "none"


def saved_modules(model: nn.Module, layers: Mapping[str, AdapterLayer]) -> SavedModules:
    """Everything trainable that is no adapter's: a bias by itself, anything else with its whole module.

    Args:
        model: with `layers` in it.
        layers: the adapted layers.

    >>> model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 3)}).requires_grad_(False)
    >>> _ = model["head"].requires_grad_(True)
    >>> found = saved_modules(model, {})
    >>> found.modules, sorted(found.tensors)
    (['head'], ['head.bias', 'head.weight'])
    """
    found = SavedModules()
    for name, module in model.named_modules():
        if isinstance(module, AdapterLayer):
            continue
        training = [key for key, value in module.named_parameters(recurse=False) if value.requires_grad]
        if not training:
            continue
        layer = name.removesuffix(".fixed_linear")
        adapted = layer != name and layer in layers
        if training == ["bias"]:
            found.bias = "all" if found.bias == "all" or not adapted else "only"
            found.tensors[f"{layer}.base_layer.bias" if adapted else f"{name}.bias"] = _kept(module.bias)
            continue
        found.modules.append(layer)
        for key, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            found.tensors[f"{layer}.{key}"] = _kept(value)
    return found


def mark_replaced(module: nn.Module) -> None:
    """Remember that an adapter's file brought tensors of a module, whether they train or not."""
    setattr(module, REPLACED, True)


def replaced_modules(model: nn.Module) -> list[str]:
    """Modules with own tensors that came with an adapter, or that train beside one.

    >>> model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 3)}).requires_grad_(False)
    >>> mark_replaced(model["head"])
    >>> replaced_modules(model)
    ['head']
    """
    return [
        name.partition(".fixed_linear")[0]
        for name, module in model.named_modules()
        if not isinstance(module, AdapterLayer)
        and (hasattr(module, REPLACED) or any(value.requires_grad for value in module.parameters(recurse=False)))
    ]


def _kept(tensor: Tensor | nn.Module) -> Tensor:
    assert isinstance(tensor, Tensor)
    return whole(tensor).detach()
